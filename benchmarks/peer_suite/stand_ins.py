"""Writes tiny random models and adapters under the hub ids that peft's tests name: ``python stand_ins.py CACHE``.

They are laid out as huggingface_hub's cache, so that the ids resolve offline. The adapters are made by real peft.
Needs peft, diffusers and tokenizers.
"""

from __future__ import annotations

import copy
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import transformers as tf

REVISION = "0" * 40
VOCAB = 1024
# In the order of their ids. Padding has none of those that tests put in: its embedding is zero.
SPECIAL = {"bos_token": "<s>", "unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>"}
IDS: dict[str, Any] = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 3}
BLOCKS: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
LLAMA: dict[str, Any] = {**IDS, **BLOCKS, "num_key_value_heads": 2, "max_position_embeddings": 256}
ENCODER: dict[str, Any] = {**BLOCKS, "vocab_size": VOCAB, "pad_token_id": 3, "max_position_embeddings": 256}
# Weights so large that an adapter is seen in the output.
STRONG = {"initializer_range": 0.2}
MOE: dict[str, Any] = {**LLAMA, "head_dim": 8}
VISION: dict[str, Any] = {**BLOCKS, "image_size": 30, "patch_size": 15, "projection_dim": 32}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


@cache
def tokenizer(size: int = VOCAB) -> tf.PreTrainedTokenizerFast:
    """Train a byte-level tokenizer on Python's own licence and help texts."""
    import os
    import pydoc_data.topics
    import string

    from tokenizers import ByteLevelBPETokenizer

    trained = ByteLevelBPETokenizer()
    texts = [os.__doc__ or "", string.__doc__ or "", *pydoc_data.topics.topics.values()]
    trained.train_from_iterator(texts, vocab_size=size - 100, special_tokens=[*SPECIAL.values()], show_progress=False)
    return tf.PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, **SPECIAL)


def opt(**changes: Any) -> tf.OPTConfig:
    """Return the config of a small OPT."""
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 4, "num_hidden_layers": 5}
    return tf.OPTConfig(**{**IDS, **sizes, "num_attention_heads": 4, "max_position_embeddings": 256, **changes})


# A test counts on the width, another on the number of layers.
OPT_125M = {"hidden_size": 768, "word_embed_proj_dim": 768, "ffn_dim": 64, "num_hidden_layers": 12}


def gpt2(**changes: Any) -> tf.GPT2Config:
    """Return the config of a small GPT-2."""
    sizes = {"n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 512}
    return tf.GPT2Config(**{**sizes, "vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 2, **changes})


def t5(**changes: Any) -> tf.T5Config:
    """Return the config of a small T5."""
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 5, "num_decoder_layers": 5, "num_heads": 4}
    ids = {"vocab_size": VOCAB, "eos_token_id": 2, "pad_token_id": 3, "decoder_start_token_id": 3}
    return tf.T5Config(**{**sizes, **ids, **changes})


def bert(**changes: Any) -> tf.BertConfig:
    """Return the config of a small BERT."""
    return tf.BertConfig(**{**ENCODER, **changes})


def roberta(**changes: Any) -> tf.RobertaConfig:
    """Return the config of a small RoBERTa."""
    return tf.RobertaConfig(**{**ENCODER, "bos_token_id": 0, "eos_token_id": 2, **changes})


def llama(**changes: Any) -> tf.LlamaConfig:
    """Return the config of a small Llama."""
    return tf.LlamaConfig(**{**LLAMA, **changes})


def sides(**sizes: int) -> dict[str, int]:
    """Return the settings of an encoder and a decoder of the same size."""
    return {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in sizes.items()}


def bart() -> tf.BartConfig:
    """Return the config of a small BART."""
    sizes = sides(layers=2, attention_heads=4, ffn_dim=4)
    return tf.BartConfig(**IDS, **sizes, d_model=16, max_position_embeddings=256, decoder_start_token_id=2)


def whisper() -> tf.WhisperConfig:
    """Return the config of a small Whisper."""
    sizes = sides(layers=2, attention_heads=2, ffn_dim=4)
    lengths = {"max_source_positions": 30, "max_target_positions": 40, "num_mel_bins": 80, "decoder_start_token_id": 2}
    return tf.WhisperConfig(**IDS, **sizes, **lengths, d_model=16, suppress_tokens=None, begin_suppress_tokens=None)


def llava(**text: Any) -> tf.LlavaConfig:
    """Return the config of a small LLaVA, whose images take four tokens."""
    vision = tf.CLIPVisionConfig(**VISION)
    return tf.LlavaConfig(
        vision_config=vision, text_config=llama(**text), image_token_index=VOCAB - 100, image_seq_length=4
    )


def gemma3() -> tf.Gemma3TextConfig:
    """Return the config of a small Gemma 3."""
    return tf.Gemma3TextConfig(**LLAMA, **STRONG, head_dim=8, sliding_window=64)


def gemma4() -> Any:
    """Return the config of a small Gemma 4, whose layers have heads of two sizes and share keys and values."""
    layers = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    sizes = {**LLAMA, "num_hidden_layers": 4, "num_key_value_heads": 1, "num_kv_shared_layers": 2}
    heads = {"head_dim": 8, "global_head_dim": 16, "layer_types": layers, "sliding_window": 64}
    own = {"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8}
    return tf.Gemma4TextConfig(**{**sizes, **heads, **own, **STRONG})


def llama4() -> Any:
    """Return the config of a small Llama 4, all of whose layers have experts."""
    sizes = {"intermediate_size_mlp": 64, "num_local_experts": 4, "interleave_moe_layer_step": 1}
    return tf.Llama4TextConfig(**{**LLAMA, **sizes, "head_dim": 8, "attention_chunk_size": 128})


def gpt_oss() -> Any:
    """Return the config of a small gpt-oss."""
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 64}
    return tf.GptOssConfig(**LLAMA, **STRONG, **sizes)


def nemotron_h() -> Any:
    """Return the config of a small Nemotron-H."""
    mamba = {"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 16, "n_groups": 2, "chunk_size": 16}
    layers = ["mamba", "attention", "mlp"]
    sizes = {**LLAMA, "head_dim": 8, "layers_block_type": layers}
    sizes.pop("num_hidden_layers")
    return tf.NemotronHConfig(**sizes, **mamba)


def qwen_vl() -> Any:
    """Return the config of a small Qwen2.5-VL."""
    ropes = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 4, "intermediate_size": 64, "out_hidden_size": 32}
    return tf.Qwen2_5_VLConfig(text_config={**LLAMA, "rope_parameters": ropes}, vision_config=vision)


def resnet() -> tf.ResNetConfig:
    """Return the config of a small ResNet."""
    sizes = {"embedding_size": 10, "hidden_sizes": [10, 20, 30, 40], "depths": [1, 1, 2, 1]}
    return tf.ResNetConfig(num_channels=3, hidden_act="relu", num_labels=3, **sizes)


# The full size, which a test counts: in half precision, to take less of the disk.
FULL_GPT2 = lambda: tf.GPT2LMHeadModel(tf.GPT2Config()).half()  # noqa: E731

P, T, H = "peft-internal-testing", "trl-internal-testing", "hf-internal-testing"
MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    f"{P}/tiny-random-OPTForCausalLM": lambda: tf.OPTForCausalLM(opt()),
    f"{P}/opt-125m": lambda: tf.OPTForCausalLM(opt(**OPT_125M)),
    f"{P}/tiny-random-GPT2LMHeadModel": lambda: tf.GPT2LMHeadModel(gpt2()),
    f"{P}/tiny-random-gpt2": lambda: tf.GPT2LMHeadModel(gpt2()),
    f"{H}/tiny-random-gpt2": lambda: tf.GPT2LMHeadModel(gpt2()),
    "openai-community/gpt2": FULL_GPT2,
    "gpt2": lambda: tf.GPT2LMHeadModel(gpt2()),
    "bert-base-uncased": lambda: tf.BertForPreTraining(bert()),
    f"{P}/tiny-random-GPTJForCausalLM": lambda: tf.GPTJForCausalLM(
        tf.GPTJConfig(
            vocab_size=VOCAB,
            n_positions=256,
            n_embd=32,
            n_layer=5,
            n_head=4,
            rotary_dim=4,
            bos_token_id=0,
            eos_token_id=2,
        )
    ),
    f"{P}/tiny-random-GPTNeoXForCausalLM": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**IDS, **BLOCKS)),
    f"{P}/tiny-random-BloomForCausalLM": lambda: tf.BloomForCausalLM(
        tf.BloomConfig(**IDS, hidden_size=32, n_layer=5, n_head=4)
    ),
    f"{P}/tiny-random-LlamaForCausalLM": lambda: tf.LlamaForCausalLM(llama()),
    f"{T}/tiny-random-LlamaForCausalLM": lambda: tf.LlamaForCausalLM(llama()),
    f"{H}/tiny-random-LlamaForCausalLM": lambda: tf.LlamaForCausalLM(llama()),
    f"{T}/tiny-LlamaForSequenceClassification-3.2": lambda: tf.LlamaForSequenceClassification(llama()),
    f"{H}/tiny-random-MistralForCausalLM": lambda: tf.MistralForCausalLM(tf.MistralConfig(**LLAMA)),
    f"{P}/tiny-dummy-qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**LLAMA, **STRONG)),
    f"{T}/tiny-Qwen3ForCausalLM": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**LLAMA, head_dim=8)),
    "Qwen/Qwen2-0.5B": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**{**LLAMA, "tie_word_embeddings": True})),
    f"{H}/tiny-random-Gemma3ForCausalLM": lambda: tf.Gemma3ForCausalLM(gemma3()),
    f"{P}/tiny-random-gemma4-E2B": lambda: tf.Gemma4ForCausalLM(gemma4()),
    f"{T}/tiny-Llama4ForCausalLM": lambda: tf.Llama4ForCausalLM(llama4()),
    f"{T}/tiny-GptOssForCausalLM": lambda: tf.GptOssForCausalLM(gpt_oss()).bfloat16(),
    f"{H}/Mixtral-tiny": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**LLAMA, num_local_experts=4)),
    f"{H}/tiny-qwen3-moe": lambda: tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**MOE, **EXPERTS)),
    f"{T}/tiny-Qwen3MoeForCausalLM": lambda: tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**MOE, **EXPERTS)),
    f"{T}/tiny-NemotronHForCausalLM-nano": lambda: tf.NemotronHForCausalLM(nemotron_h()),
    "tiiuae/falcon-mamba-tiny-dev": lambda: tf.FalconMambaForCausalLM(
        tf.FalconMambaConfig(**IDS, hidden_size=32, num_hidden_layers=2, state_size=4)
    ),
    f"{P}/tiny-random-t5": lambda: tf.T5ForConditionalGeneration(t5()),
    f"{P}/tiny-random-T5ForConditionalGeneration": lambda: tf.T5ForConditionalGeneration(t5()),
    f"{P}/tiny-random-T5ForConditionalGeneration-calibrated": lambda: tf.T5ForConditionalGeneration(t5()),
    "google/flan-t5-small": lambda: tf.T5ForConditionalGeneration(
        t5(d_model=64, feed_forward_proj="gated-gelu", tie_word_embeddings=False, initializer_factor=0.3)
    ),
    f"{P}/tiny-random-BartForConditionalGeneration": lambda: tf.BartForConditionalGeneration(bart()),
    f"{P}/tiny-random-WhisperForConditionalGeneration": lambda: tf.WhisperForConditionalGeneration(whisper()),
    f"{P}/tiny-random-BertModel": lambda: tf.BertForPreTraining(bert()),
    f"{H}/tiny-random-BertModel": lambda: tf.BertForPreTraining(bert()),
    f"{P}/tiny-random-BertForSequenceClassification": lambda: tf.BertForSequenceClassification(bert()),
    f"{P}/tiny-random-RobertaModel": lambda: tf.RobertaModel(roberta()),
    f"{P}/tiny-random-RobertaForSequenceClassification": lambda: tf.RobertaForSequenceClassification(roberta()),
    f"{P}/tiny-random-DebertaModel": lambda: tf.DebertaModel(tf.DebertaConfig(**ENCODER)),
    f"{P}/tiny-random-DebertaV2Model": lambda: tf.DebertaV2Model(tf.DebertaV2Config(**ENCODER)),
    f"{P}/tiny-random-ResNetForImageClassification": lambda: tf.ResNetForImageClassification(resnet()),
    f"{P}/tiny-LlavaForConditionalGeneration": lambda: tf.LlavaForConditionalGeneration(llava()),
    f"{H}/tiny-random-LlavaForConditionalGeneration": lambda: tf.LlavaForConditionalGeneration(llava()),
    f"{P}/tiny-clip-text-2": lambda: tf.CLIPTextModelWithProjection(
        tf.CLIPTextConfig(**IDS, **BLOCKS, projection_dim=32, max_position_embeddings=77)
    ),
    f"{T}/tiny-Qwen2_5_VLForConditionalGeneration": lambda: tf.Qwen2_5_VLForConditionalGeneration(qwen_vl()),
}
# Ids whose tests compare revisions of one model with each other.
REVISIONS = {f"{P}/tiny-random-BertModel": "v2.0.0", f"{H}/tiny-random-BertModel": "v1.2.3"}

OPT, WHISPER = f"{P}/tiny-random-OPTForCausalLM", f"{P}/tiny-random-WhisperForConditionalGeneration"
TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "ForSeq2SeqLM": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "": "FEATURE_EXTRACTION",
}
# The base of each adapter, and the ending of the class among transformers' AutoModel... that builds it.
ADAPTERS = {
    f"{P}/tiny-OPTForCausalLM-lora": (OPT, "ForCausalLM"),
    f"{P}/opt-125m-dummy-lora": (f"{P}/opt-125m", "ForCausalLM"),
    f"{P}/gpt2-lora-random": ("openai-community/gpt2", "ForCausalLM"),
    f"{P}/tiny_T5ForSeq2SeqLM-lora": (f"{P}/tiny-random-t5", "ForSeq2SeqLM"),
    f"{P}/tiny_OPTForSequenceClassification-lora": (OPT, "ForSequenceClassification"),
    f"{P}/tiny_GPT2ForTokenClassification-lora": (f"{P}/tiny-random-gpt2", "ForTokenClassification"),
    f"{P}/tiny_OPTForQuestionAnswering-lora": (OPT, "ForQuestionAnswering"),
    f"{P}/tiny_OPTForFeatureExtraction-lora": (OPT, ""),
    f"{P}/tiny_WhisperForConditionalGeneration-lora": (WHISPER, "ForSpeechSeq2Seq"),
    f"{P}/tiny-random-BertModel-lora": (f"{H}/tiny-random-BertModel", "ForCausalLM"),
    f"{P}/tiny-opt-lora-revision": (OPT, "ForCausalLM"),
    f"{P}/test-lora-subfolder": (OPT, "ForCausalLM"),
    "ybelkada/test-st-lora": (OPT, "ForCausalLM"),
}
ADAPTER_REFS = {f"{P}/tiny-random-BertModel-lora": "v1.2.3", f"{P}/tiny-opt-lora-revision": "test"}
# Adapters whose tokenizer has more tokens than their base's embedding, with the ref that has them.
GROWN = {f"{P}/tiny-random-OPTForCausalLM-extended-vocab": "main", f"{P}/opt-tokenizer-revision": "my-revision"}


class Hub:
    """A cache of huggingface_hub's layout that is being written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def snapshot(self, repo: str, ref: str = "main", revision: str = REVISION) -> Path:
        """Return the folder for the files of a repository at a ref."""
        root = self.folder / f"models--{repo.replace('/', '--')}"
        (root / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (root / "refs" / ref).write_text(revision)
        (root / "snapshots" / revision).mkdir(parents=True, exist_ok=True)
        return root / "snapshots" / revision

    def model(self, repo: str, make: Callable[[], torch.nn.Module], ref: str = "main", seed: int = 0) -> None:
        """Save a new model and its tokenizer."""
        torch.manual_seed(seed)
        folder = self.snapshot(repo, ref, str(seed) * 40)
        model = make()
        model.save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        save_processors(folder, repo)

    def path(self, repo: str) -> Path:
        """Return the folder with the files of a repository that is written already."""
        return self.folder / f"models--{repo.replace('/', '--')}" / "snapshots" / REVISION


def save_processors(folder: Path, repo: str) -> None:
    """Save what prepares the images of a vision model."""
    if "ResNet" in repo:
        tf.ConvNextImageProcessor(size={"shortest_edge": 64}, crop_pct=1.0).save_pretrained(folder)
    if "Llava" in repo:
        images = tf.CLIPImageProcessor(size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30})
        words = copy.deepcopy(tokenizer())
        words.add_special_tokens({"additional_special_tokens": ["<image>"]})
        words.save_pretrained(folder)
        images_by = {"patch_size": 15, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        tf.LlavaProcessor(images, words, **images_by, image_token="<image>").save_pretrained(folder)


def adapted(hub: Hub, base: str, auto: str) -> Any:
    """Return a base with a random LoRA by peft, its config naming the base by its hub id."""
    import peft

    torch.manual_seed(1)
    model = getattr(tf, f"AutoModel{auto}").from_pretrained(hub.path(base))
    model.name_or_path = model.config._name_or_path = base
    targets = ["q_proj", "v_proj"] if base == WHISPER else None
    config = peft.LoraConfig(task_type=TASKS.get(auto), target_modules=targets, init_lora_weights=False)
    return peft.get_peft_model(model, config)


def write_adapter(hub: Hub, repo: str) -> None:
    """Write an adapter, by peft."""
    model = adapted(hub, *ADAPTERS[repo])
    folder = hub.snapshot(repo)
    model.save_pretrained(folder, save_embedding_layers=False)
    if repo.endswith("subfolder"):
        model.save_pretrained(folder / "test", save_embedding_layers=False)
    if repo in ADAPTER_REFS:
        hub.snapshot(repo, ADAPTER_REFS[repo])


def write_grown(hub: Hub, repo: str, ref: str) -> None:
    """Write an adapter whose embedding and tokenizer have grown."""
    import peft

    base = OPT
    words = tf.AutoTokenizer.from_pretrained(hub.path(base))
    words.add_tokens([f"<new{number}>" for number in range(VOCAB + 2 - len(words))])
    torch.manual_seed(1)
    model = tf.AutoModelForCausalLM.from_pretrained(hub.path(base))
    model.resize_token_embeddings(len(words))
    model.name_or_path = model.config._name_or_path = base
    grown = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    revision = REVISION if ref == "main" else "1" * 40
    folder = hub.snapshot(repo, ref, revision)
    grown.save_pretrained(folder, save_embedding_layers=True)
    words.save_pretrained(folder)


def write_old_boft(hub: Hub) -> None:
    """Write a BOFT adapter as peft 0.12 did: with its permutations in the checkpoint."""
    import peft
    from safetensors.torch import load_file, save_file

    base, repo = OPT, f"{P}/boft-tiny-opt-peft-v0.12"
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_pretrained(hub.path(base))
    model.name_or_path = model.config._name_or_path = base
    boft = peft.get_peft_model(model, peft.BOFTConfig(init_weights=False))
    folder = hub.snapshot(repo)
    boft.save_pretrained(folder)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    for name, tensor in boft.state_dict().items():
        if "boft_P" in name:
            tensors[name] = tensor.clone()
    save_file(tensors, file, metadata={"format": "pt"})


def write_diffusers(hub: Hub) -> None:
    """Write the pipelines of diffusers."""
    import diffusers

    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=2, sample_size=32, in_channels=4, out_channels=4,
        cross_attention_dim=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=[32, 64], in_channels=3, out_channels=3, latent_channels=4,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
    )  # fmt: skip
    text = tf.CLIPTextModel(tf.CLIPTextConfig(**IDS, **BLOCKS, max_position_embeddings=77))
    scheduler = diffusers.PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True
    )
    with tempfile.TemporaryDirectory() as folder:
        clip = clip_tokenizer(Path(folder))
        pipeline = diffusers.StableDiffusionPipeline(
            vae=vae, text_encoder=text, tokenizer=clip, unet=unet, scheduler=scheduler,
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        pipeline.save_pretrained(hub.snapshot(f"{H}/tiny-sd-pipe"))
    torch.manual_seed(1)
    flux = diffusers.Flux2Transformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, timestep_guidance_channels=256, axes_dims_rope=[4, 4, 4, 4],
    )  # fmt: skip
    flux.save_pretrained(hub.snapshot(f"{H}/tiny-flux2") / "transformer")


def clip_tokenizer(folder: Path) -> Any:
    """Return a tokenizer of CLIP's kind with the letters alone."""
    import json

    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789.,!?'-"]
    words = [*SPECIAL.values(), "<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return tf.CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def write(folder: Path) -> Iterator[str]:
    """Write all stand-ins, and yield a line for each that this machine's packages cannot make."""
    hub = Hub(folder)
    steps: dict[str, Callable[[], None]] = {repo: partial(hub.model, repo, make) for repo, make in MODELS.items()}
    for repo, ref in REVISIONS.items():
        steps[f"{repo}@{ref}"] = partial(hub.model, repo, MODELS[repo], ref, seed=2)
    steps |= {repo: partial(write_adapter, hub, repo) for repo in ADAPTERS}
    steps |= {repo: partial(write_grown, hub, repo, ref) for repo, ref in GROWN.items()}
    steps |= {"BOFT of peft 0.12": partial(write_old_boft, hub), "diffusers": partial(write_diffusers, hub)}
    for name, step in steps.items():
        try:
            step()
        except Exception as error:
            yield f"{name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


if __name__ == "__main__":
    target = Path(sys.argv[1])
    shutil.rmtree(target, ignore_errors=True)
    for line in write(target):
        print(line)
