"""What Veneer does otherwise while it stands in for peft."""

from __future__ import annotations

from pathlib import Path

from tests.as_peft.process import printed

OPEN = """
    import warnings, gc, torch, peft
    from tests.models import build, inputs, logits
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    batch = inputs("llama")
    base = build("llama")
    plain = logits(base, batch)
    def again(make):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = make()
        second = any("modify a model with PEFT for a second time" in str(w.message) for w in caught)
        print(second, list(model.peft_config), model.active_adapters, torch.equal(logits(base, batch), plain), end=" ")
        print(torch.equal(logits(model.unload(), batch), plain))
"""


def test_a_model_that_is_wrapped_again_gets_the_new_adapter_alone() -> None:
    lines = printed(
        OPEN
        + """
    model = peft.get_peft_model(base, config)
    again(lambda: peft.get_peft_model(model, config, "other"))
    model = peft.get_peft_model(base, config)
    again(lambda: peft.get_peft_model(base, config))
    model = peft.get_peft_model(base, config)
    model.merge_adapter()
    del model
    gc.collect()
    again(lambda: peft.get_peft_model(base, config))
    peft.inject_adapter_in_model(config, base)
    again(lambda: peft.get_peft_model(base, config))
    """
    )
    assert lines == [
        "True ['other'] ['other'] False True",
        *["True ['default'] ['default'] False True"] * 3,
    ]


def test_a_start_that_is_taken_off_the_base_is_saved_and_left_as_with_peft(tmp_path: Path) -> None:
    lines = printed(
        OPEN
        + f"""
    torch.nn.Module.gap = lambda self, other: float((logits(self, batch) - other).abs().max())
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa", r=4)
    model = peft.get_peft_model(base, config)
    model.save_pretrained("{tmp_path}/own")
    again = peft.PeftModel.from_pretrained(build("llama"), "{tmp_path}/own")
    print(again.peft_config["default"].r, again.peft_config["default"].init_lora_weights, again.gap(plain) < 1e-5)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained("{tmp_path}/initial")
    left = model.unload()
    print(left.gap(plain) > 1e-3, peft.PeftModel.from_pretrained(left, "{tmp_path}/initial").gap(plain) < 1e-5)
    """
    )
    assert lines == ["4 pissa True", "True True"]


def test_a_method_s_class_makes_its_tuner() -> None:
    lines = printed(
        OPEN
        + """
    tuner = peft.LoraModel(base, {"x": config}, "x")
    print(isinstance(tuner, peft.LoraModel), isinstance(tuner, peft.IA3Model), tuner.prefix, tuner.active_adapters)
    try: peft.tuners.lora.LoraLayer(base)
    except ValueError as error: print(error)
    """
    )
    assert lines[0] == "True False lora_ ['x']"
    assert "LoraLayer cannot be made by itself here" in lines[1]


def test_modules_that_a_config_means_are_told_by_peft_s_functions() -> None:
    lines = printed("""
    from torch import nn
    from peft import LoraConfig, get_peft_model
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
    from peft.tuners.tuners_utils import inspect_matched_modules
    base = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    config = LoraConfig(target_modules=["a"], exclude_modules=["x.a"])
    print(check_target_module_exists(config, "m.a"), check_target_module_exists(config, "x.a"))
    print(sorted(_maybe_include_all_linear_layers(LoraConfig(target_modules="all-linear"), base).target_modules))
    print(inspect_matched_modules(get_peft_model(base, config))["matched"])
    """)
    assert lines == ["True False", "['a', 'b']", "['a']"]


def test_a_pickle_of_tensors_alone_is_read_as_peft_reads_it(tmp_path: Path) -> None:
    lines = printed(
        OPEN
        + f"""
    import os, pickle
    model = peft.get_peft_model(base, config)
    expected = logits(model, batch)
    model.save_pretrained({str(tmp_path)!r}, safe_serialization=False)
    loaded = peft.PeftModel.from_pretrained(build("llama"), {str(tmp_path)!r})
    print(sorted(os.listdir({str(tmp_path)!r})), torch.allclose(logits(loaded, batch), expected, atol=1e-5))
    with open({str(tmp_path / "adapter_model.bin")!r}, "wb") as file:
        pickle.dump({{"base_model.model.x": print}}, file)
    try:
        peft.PeftModel.from_pretrained(build("llama"), {str(tmp_path)!r})
    except Exception as error:
        print(type(error).__name__)
    """
    )
    assert lines == ["['README.md', 'adapter_config.json', 'adapter_model.bin'] True", "PickleRefusedError"]


def test_an_injected_adapter_s_layers_are_those_of_its_tensors() -> None:
    lines = printed(
        OPEN
        + """
    peft.inject_adapter_in_model(config, base)
    tensors = {k: v for k, v in peft.get_peft_model_state_dict(base).items() if "layers.0" in k}
    other = torch.compile(build("llama"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        peft.inject_adapter_in_model(config, other, state_dict=tensors)
    text = str(caught[0].message)
    print([issubclass(w.category, RuntimeWarning) for w in caught], "layers.1.self_attn.q_proj" in text)
    print(sorted(peft.get_peft_model_state_dict(other)) == sorted(tensors))
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["v_proj"], r=2), other)
    print(*peft.get_peft_model_state_dict(other))
    """
    )
    assert lines[0] == "[True] True"
    assert lines[1] == "True"
    assert lines[2].count("v_proj") == lines[2].count(".weight") == 4


def test_a_program_can_register_the_usual_targets_of_a_model_type() -> None:
    lines = printed("""
    from types import SimpleNamespace
    from torch import nn
    from peft import LoraConfig, get_peft_model
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as usual
    base = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    base.config = SimpleNamespace(to_dict=lambda: {"model_type": "mine"})
    usual["mine"] = ["b"]
    print(usual["llama"], get_peft_model(base, LoraConfig()).targeted_module_names)
    """)
    assert lines == ["['q_proj', 'v_proj'] ['b']"]


def test_a_choice_in_training_mode_makes_an_adapter_trainable(tmp_path: Path) -> None:
    lines = printed(
        OPEN
        + f"""
    peft.get_peft_model(build("llama"), config).save_pretrained({str(tmp_path)!r})
    model = peft.PeftModel.from_pretrained(build("llama"), {str(tmp_path)!r})
    def choose(**options):
        model.set_adapter("default", **options)
        print(sum(parameter.requires_grad for parameter in model.parameters()))
    choose()
    model.train()
    choose()
    choose(inference_mode=True)
    """
    )
    assert lines == ["0", "4", "0"]


def test_the_warnings_that_peft_s_users_expect_are_given() -> None:
    lines = printed(
        OPEN
        + """
    from torch import nn
    def told(call, *words):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            made = call()
        texts = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
        print(*[any(word in text for text in texts) for word in words])
        return made
    mine = nn.Sequential(nn.Linear(4, 4))
    named = peft.LoraConfig(target_modules=["0"], base_model_name_or_path="theirs")
    model = told(lambda: peft.get_peft_model(mine, named, "lora"), "renamed from 'theirs' to 'None'", "in the prefix")
    print(named.base_model_name_or_path, model.peft_config["lora"].base_model_name_or_path)
    told(lambda: model.add_adapter("ora_", named), "Adapter name 'ora_' should not be contained in the prefix 'lora_'")
    told(lambda: model.add_adapter("other", named), "renamed", "in the prefix")
    from transformers import LlamaConfig, LlamaForCausalLM
    sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    tied = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True))
    model = peft.get_peft_model(tied, peft.LoraConfig(target_modules=["embed_tokens"], init_lora_weights=False))
    told(model.merge_and_unload, "Setting tie_word_embeddings=False in the config")
    typo = peft.LoraConfig(target_modules=["0"], modules_to_save=["hed"])
    told(lambda: peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), typo), "modules_to_save names 'hed'")
    """
    )
    assert lines == ["True True", "theirs None", "True", "False False", "True", "True"]


def test_an_alora_that_sees_no_tokens_does_nothing_with_a_warning() -> None:
    lines = printed(
        OPEN
        + """
    config.alora_invocation_tokens = [5]
    model = peft.get_peft_model(build("llama"), config)
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = model(inputs_embeds=embeddings).logits
    print("Cannot calculate aLoRA offsets" in str(caught[-1].message))
    print(torch.equal(made, build("llama")(inputs_embeds=embeddings).logits))
    """
    )
    assert lines == ["True", "True"]


def test_a_config_in_inference_mode_leaves_a_new_adapter_frozen() -> None:
    lines = printed(
        OPEN
        + """
    config.inference_mode = True
    model = peft.get_peft_model(build("llama"), config)
    print(any(p.requires_grad for p in model.parameters()), model.peft_config["default"].inference_mode)
    """
    )
    assert lines == ["False True"]


def test_an_xlora_on_a_model_that_had_one_works_alone(tmp_path: Path) -> None:
    lines = printed(
        OPEN
        + f"""
    path = {str(tmp_path)!r}
    peft.get_peft_model(build("llama"), config).save_pretrained(path + "/lora")
    base = build("llama")
    mixed = peft.XLoraConfig(task_type="CAUSAL_LM", adapters={{"0": path + "/lora"}}, hidden_size=32)
    first = peft.get_peft_model(base, mixed).eval()
    expected = first(**batch).logits
    first.save_pretrained(path + "/mixed", safe_serialization=False)
    again = peft.PeftModel.from_pretrained(base, path + "/mixed")
    print(torch.allclose(again(**batch).logits, expected, atol=1e-5))
    """
    )
    assert lines == ["True"]


def test_virtual_tokens_can_be_made_by_themselves_and_told_apart() -> None:
    lines = printed(
        OPEN
        + """
    from peft.tuners import MultitaskPromptEmbedding
    sizes = dict(num_virtual_tokens=3, token_dim=32, num_layers=2, num_attention_heads=2, num_transformer_submodules=1)
    places = torch.tensor([[0, 2]])
    words = build("llama").get_input_embeddings()
    table = peft.PromptEmbedding(peft.PromptTuningConfig(**sizes), words)
    print(torch.equal(table(places)[0], table.embedding.weight[[0, 2]]), isinstance(table, peft.PromptEmbedding))
    print(*peft.PrefixEncoder(peft.PrefixTuningConfig(**sizes))(places).shape)
    tasks = MultitaskPromptEmbedding(peft.MultitaskPromptTuningConfig(**sizes, num_tasks=2), words)
    print(*tasks(places.repeat(2, 1), torch.tensor([0, 1])).shape)
    model = peft.get_peft_model(build("llama"), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    kinds = (peft.PrefixEncoder, peft.PromptEmbedding, peft.CartridgeEncoder)
    print(*(isinstance(model.prompt_encoder["default"], kind) for kind in kinds))
    try:
        peft.PrefixEncoder(peft.PrefixTuningConfig(num_virtual_tokens=3))
    except ValueError as error:
        print(error)
    """
    )
    assert lines[:4] == ["True True", "1 2 128", "2 2 32", "True False False"]
    assert "PrefixEncoder: the config does not say token_dim" in lines[4]
