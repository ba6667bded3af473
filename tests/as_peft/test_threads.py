"""A block without adapters holds for all threads, as with peft, and one of Veneer's own for its thread alone."""

from __future__ import annotations

from tests.as_peft.process import printed

OPEN = """
    import torch
    from concurrent.futures import ThreadPoolExecutor
    from threading import Thread
    from peft import LoraConfig, get_peft_model
    from tests.models import build, inputs, logits
    batch = inputs("llama")
    base = logits(build("llama"), batch)
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(build("llama"), config).eval()
    adapted = logits(model, batch)
    def in_thread(ask=lambda: logits(model, batch)):
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(ask).result()
"""


def test_a_thread_that_is_started_in_the_block_has_no_adapters() -> None:
    lines = printed(
        OPEN
        + """
    with model.disable_adapter():
        print(torch.equal(in_thread(), base), torch.equal(logits(model, batch), base))
        with model.disable_adapter():
            pass
        print(torch.equal(in_thread(), base))
    print(torch.equal(in_thread(), adapted), torch.equal(logits(model, batch), adapted))
    """
    )
    assert lines == ["True True", "True", "True True"]


def test_a_thread_with_a_block_of_its_own_keeps_to_it() -> None:
    lines = printed(
        OPEN
        + """
    def own():
        with model.using("default"):
            return logits(model, batch)
    with model.disable_adapter():
        print(torch.equal(in_thread(own), adapted))
    with model.using([]):
        print(torch.equal(in_thread(), adapted))
    """
    )
    assert lines == ["True", "True"]
