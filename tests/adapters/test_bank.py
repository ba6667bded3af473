"""A bank of adapters: each row is as under its adapter alone, whatever came and went before."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import veneer
from tests.models import build, gap, inputs, tokens
from tests.random_adapters import enlarge
from veneer.adapters.bank import AdapterBank
from veneer.errors import AdapterError, BankFullError, UnknownAdapterError, UnsupportedError, UsageError
from veneer.patches.slots import LayerSlots

CLOSE = 1e-5
QV = ["q_proj", "v_proj", "down_proj"]
KINDS: dict[str, veneer.PeftConfig] = {
    "lora": veneer.LoraConfig(r=4, target_modules=QV),
    "rslora": veneer.LoraConfig(r=3, target_modules="all-linear", use_rslora=True),
    "dora": veneer.LoraConfig(r=2, target_modules=QV, use_dora=True),
    "wide": veneer.LoraConfig(r=21, target_modules=["v_proj"]),
    "ia3": veneer.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "vera": veneer.VeraConfig(r=8, target_modules=["q_proj", "v_proj"]),
    "bias": veneer.LoraConfig(r=2, target_modules=["o_proj"], bias="lora_only", lora_bias=True),
    "head": veneer.LoraConfig(r=2, target_modules=["lm_head", "q_proj"]),
    "embedding": veneer.LoraConfig(r=2, target_modules=["embed_tokens", "up_proj"]),
    "whole norm": veneer.LoraConfig(r=2, target_modules=["k_proj"], modules_to_save=["model.norm"]),
    "tokens": veneer.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[5, 6, 7]),
    "loha": veneer.LoHaConfig(r=2, target_modules=["q_proj", "up_proj"]),
    "shira": veneer.ShiraConfig(r=1, target_modules=["q_proj"]),
    "oft": veneer.OFTConfig(oft_block_size=8, r=0, target_modules=["q_proj"]),
    "ranks": veneer.LoraConfig(r=2, target_modules=QV, rank_pattern={"down_proj": 11}),
}
# What has no fused form somewhere.
ROW_BY_ROW = {"embedding", "whole norm", "tokens", "shira", "oft"}


def made(names: Sequence[str], arch: str = "llama") -> veneer.PeftModel:
    model = veneer.PeftModel(build(arch))
    for seed, name in enumerate(names):
        model.add_adapter(name, KINDS[name], seed=seed)
        enlarge(model, name, seed)
        model.set_requires_grad(name, False)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> veneer.PeftModel:
    return made([*KINDS])


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def alone(model: veneer.PeftModel, name: str | None, **batch: Any) -> Tensor:
    with model.disable_adapter() if name is None else model.using(name):
        logits: Tensor = model(**batch).logits
        return logits


def check(
    model: veneer.PeftModel, bank: veneer.AdapterBank, names: Sequence[str | None], needs_slots: bool = True
) -> None:
    """Compare rows, and parts of a packed row, with each adapter alone."""
    leases = {name: bank.lease(name, needs_slots=needs_slots) for name in dict.fromkeys(names) if name is not None}
    leased = [None if name is None else leases[name] for name in names]
    batch = tokens(len(names), 5)
    found = model(**batch, adapter_names=bank.plan(leased)).logits
    for row, name in enumerate(names):
        assert gap(found[row], alone(model, name, **batch)[row]) < CLOSE, name
    counts = [row % 4 + 1 for row in range(len(names))]
    total = sum(counts)
    ids = tokens(1, total)["input_ids"]
    packed = {
        "input_ids": ids,
        "position_ids": torch.cat([torch.arange(count) for count in counts])[None],
        "attention_mask": torch.block_diag(*[torch.ones(n, n) for n in counts]).tril().bool()[None, None],
        "logits_to_keep": torch.tensor(counts).cumsum(0) - 1,
    }
    found = model(**packed, adapter_names=bank.plan([*zip(leased, counts, strict=True)])).logits[0]
    for place, (name, part) in enumerate(zip(names, ids[0].split(counts), strict=True)):
        assert gap(found[place], alone(model, name, input_ids=part[None])[0, -1]) < CLOSE, name
    for lease in leases.values():
        lease.release()


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_beside_lora_and_the_base(model: veneer.PeftModel, name: str) -> None:
    bank = model.bank(slots=4)
    check(model, bank, [name, "lora", None, name])
    check(model, bank, [None, "rslora", name])
    row_by_row = {entry.version for entry in bank.status().adapters if entry.row_by_row}
    assert row_by_row == {name} & ROW_BY_ROW
    assert bool(bank.status().row_by_row) == bool(row_by_row)


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_without_a_slot(model: veneer.PeftModel, name: str) -> None:
    bank = model.bank(slots=1, rank_buckets=(21,))
    other = "lora" if name == "rslora" else "rslora"
    with bank.lease(other):
        check(model, bank, [name, other, None, "wide", name], needs_slots=False)


def test_all_at_once_on_two_slots(model: veneer.PeftModel) -> None:
    bank = model.bank(slots=2, rank_buckets=(21,))
    check(model, bank, [*KINDS, None], needs_slots=False)
    check(model, bank, [None, *reversed(KINDS), "lora"], needs_slots=False)
    assert not bank._beside


def test_what_has_no_slot_gets_one_that_comes_free(model: veneer.PeftModel) -> None:
    bank = model.bank(slots=1, rank_buckets=(4,))
    first, second = bank.lease("lora"), bank.lease("rslora", needs_slots=False)
    batch = tokens(2)
    for names in (("lora", "rslora"), ("rslora", "rslora")):
        leases = {"lora": first, "rslora": second}
        found = model(**batch, adapter_names=bank.plan([leases[name] for name in names])).logits
        for row, name in enumerate(names):
            assert gap(found[row], alone(model, name, **batch)[row]) < CLOSE
        assert bank.status().resident == (("lora",) if names[0] == "lora" else ("rslora",))
        first.release()
    assert bank.status().row_by_row == 1
    assert not bank.folded_bytes


def test_weights_that_change_are_seen_without_a_slot() -> None:
    model = made(["lora", "rslora"])
    bank = model.bank(slots=1, rank_buckets=(4,))
    batch = tokens(1)
    with bank.lease("lora"), bank.lease("rslora", needs_slots=False) as lease:
        plan = bank.plan([lease])
        before = model(**batch, adapter_names=plan).logits
        for parameter in model.adapters.get("rslora").tensors_by_place().values():
            parameter.data.mul_(1.5)
        found = model(**batch, adapter_names=plan).logits
        assert gap(found, alone(model, "rslora", **batch)) < CLOSE
        assert gap(found, before) > CLOSE


def test_all_at_once(model: veneer.PeftModel) -> None:
    bank = model.bank(slots=16)
    check(model, bank, [*KINDS, None])
    check(model, bank, [None, *reversed(KINDS), "lora"])
    assert bank.status().writes == len(KINDS)
    assert bank.status().leases == 0


def test_slots_change_hands(model: veneer.PeftModel) -> None:
    """Whatever lay in a slot before, nothing of it is left."""
    bank = model.bank(slots={4: 2, 16: 2})
    order = [*KINDS, "dora", "lora", "ia3", "wide", "rslora", "head"]
    for first, second in pairwise(order):
        if {first, second} <= {"wide", "ranks"}:
            continue
        check(model, bank, [first, None, second, first])
    status = bank.status()
    assert status.evictions > 5
    assert len(status.resident) < len(KINDS)


@pytest.mark.parametrize("slots", [{4: 16}, {2: 32}, {1: 64}, {64: 16}])
def test_wide_adapters_take_several_slots(model: veneer.PeftModel, slots: dict[int, int]) -> None:
    names = ["wide", "lora", "ranks", "dora"]
    bank = model.bank(slots=slots)
    check(model, bank, [*names, None])
    (rank,) = slots
    assert bank.status().used[rank] == sum(-(-r // rank) for r in (21, 4, 11, 2))


def test_a_full_bank_says_so_and_goes_on(model: veneer.PeftModel) -> None:
    bank = model.bank(slots=2, rank_buckets=(4,))
    lora, dora = bank.lease("lora"), bank.lease("dora")
    with pytest.raises(BankFullError, match="2 adapters are leased"):
        bank.lease("head")
    assert bank.status().leases == 2
    again = bank.lease("lora")
    lora.release()
    with pytest.raises(BankFullError):
        bank.lease("head")
    again.release()
    again.release()
    with bank.lease("head") as head:
        batch = tokens(2)
        found = model(**batch, adapter_names=bank.plan([head, dora])).logits
        assert gap(found[0], alone(model, "head", **batch)[0]) < CLOSE
        assert gap(found[1], alone(model, "dora", **batch)[1]) < CLOSE
    dora.release()
    assert "lora" in bank
    with pytest.raises(AdapterError, match="no bucket of the bank has slots for so much"):
        bank.lease("wide")


def test_without_spilling_each_bucket_is_full_by_itself(model: veneer.PeftModel) -> None:
    for spills in (True, False):
        bank = AdapterBank(model.adapters, {4: 1, 24: 1}, spills=spills)
        with bank.lease("lora"):
            if spills:
                with bank.lease("dora"), pytest.raises(BankFullError):
                    bank.lease("wide")
            else:
                with pytest.raises(BankFullError):
                    bank.lease("dora")
                bank.lease("wide").release()
                assert (bank.need("wide"), bank.need("lora")) == ((24, 1), (4, 1))


def test_a_wide_one_needs_several_slots_and_one_of_vectors_a_row(model: veneer.PeftModel) -> None:
    bank = model.bank(slots=6, rank_buckets=(4,))
    assert {name: (bank.register(name), bank.need(name))[1] for name in ("wide", "lora", "ia3")} == {
        "wide": (4, 6),
        "lora": (4, 1),
        "ia3": (0, 1),
    }


def test_folded_forms_that_are_kept_are_counted_and_go_with_their_adapter() -> None:
    model = made(["lora", "wide"])
    bank = model.bank(slots=6, rank_buckets=(4,))
    forms = [bank.register(name).nbytes for name in ("lora", "wide")]
    assert bank.folded_bytes == sum(forms)
    bank.remove("wide")
    assert bank.folded_bytes == forms[0]
    bank.lease("lora").release()  # written into its slot
    assert bank.folded_bytes == 0 < bank.nbytes


def test_an_adapter_tells_the_memory_of_its_tensors() -> None:
    model = made(["lora", "vera", "whole norm"])
    for name in ("lora", "vera", "whole norm"):
        own = model.adapters.get(name)
        assert own.nbytes >= sum(tensor.nbytes for _, tensor in own.named_tensors())
    lora = model.adapters.get("lora")
    assert lora.nbytes == sum(tensor.nbytes for _, tensor in lora.named_tensors())
    nbytes = lora.nbytes
    model.bfloat16()
    assert lora.nbytes in (nbytes, nbytes // 2)


def test_the_last_used_stay(model: veneer.PeftModel) -> None:
    bank = model.bank(slots=2, rank_buckets=(4,))
    for name in ("lora", "dora", "lora", "head"):
        bank.lease(name).release()
    assert set(bank.status().resident) == {"lora", "head"}
    writes = bank.status().writes
    bank.lease("lora").release()
    assert bank.status().writes == writes


def test_those_in_use_come_to_lie_side_by_side(model: veneer.PeftModel) -> None:
    names = ["lora", "dora", "head", "rslora", "bias"]
    bank = model.bank(slots=5, rank_buckets=(4,))
    leases = {name: bank.lease(name) for name in names}
    for name in names[:3]:
        leases.pop(name).release()
    batch = tokens(2)
    plan = bank.plan([leases["rslora"], leases["bias"]])
    for _ in range(2):
        found = model(**batch, adapter_names=plan).logits
        for row, name in enumerate(("rslora", "bias")):
            assert gap(found[row], alone(model, name, **batch)[row]) < CLOSE
    status = bank.status()
    assert status.moves == 2
    assert len(status.resident) == 5
    check(model, bank, [*names, None])
    assert bank.status().writes == 5


def test_moves_go_on_while_slots_in_use_lie_far_apart(model: veneer.PeftModel) -> None:
    names = ["lora", "dora", "head", "bias", "rslora", "ia3", "tokens"]
    bank = model.bank(slots=8, rank_buckets=(4,))
    leases = {name: bank.lease(name) for name in names}
    for name in ("lora", "dora", "head", "bias"):
        leases.pop(name).release()
    batch, plan = tokens(3), bank.plan([leases["tokens"], leases["rslora"], None])
    for _ in range(4):
        found = model(**batch, adapter_names=plan).logits
        assert gap(found[1], alone(model, "rslora", **batch)[1]) < CLOSE
    assert bank.status().moves == 2
    in_use = bank._in_use()
    assert not list(bank._table.exchanges(in_use, 9))


def test_few_folded_forms_are_kept_ahead(model: veneer.PeftModel) -> None:
    bank = model.bank(slots=16)
    entries = [bank.register(name) for name in KINDS]
    assert sum(entry._folded is not None for entry in entries) == bank.AHEAD
    check(model, bank, [*KINDS])
    assert all(entry._folded is None for entry in entries)
    bank.prepare("lora")
    assert bank.register("lora")._folded is None, "it lies in a slot"


def test_versions_are_told_apart_from_names(model: veneer.PeftModel) -> None:
    bank = model.bank(slots=4)
    digest = ("sha256", b"\x01")
    entry = bank.register("lora", digest)
    assert (entry.version, entry.name, entry.rank, entry.row_by_row) == (digest, "lora", 4, ())
    assert bank.register("lora", digest) is entry
    for name, version in (("dora", digest), ("lora", "another")):
        with pytest.raises(AdapterError, match="is in the bank as"):
            bank.register(name, version)
    with bank.lease(digest) as lease:
        plan = bank.plan([(lease, 3), (None, 2)])
        assert plan.versions == (digest, None)
        assert plan.names == [("lora", 3), ("__base__", 2)]
        with pytest.raises(AdapterError, match="leased 1 times"):
            bank.remove(digest)
    bank.remove(digest)
    assert digest not in bank
    with pytest.raises(UnknownAdapterError, match="no version"):
        bank.lease(digest)
    with pytest.raises(UnknownAdapterError):
        bank.register("absent")


def test_a_released_lease_plans_nothing(model: veneer.PeftModel) -> None:
    bank = model.bank(slots=4)
    lease = bank.lease("lora")
    plan = bank.plan([lease])
    lease.release()
    with pytest.raises(AdapterError, match="was released"):
        model(**tokens(1), adapter_names=plan)
    with pytest.raises(AdapterError, match="was released"):
        bank.plan([lease])
    with pytest.raises(AdapterError, match="another bank"):
        model.bank().plan([bank.lease("lora")])


def test_wrong_calls(model: veneer.PeftModel) -> None:
    bank = model.bank(slots=4)
    for slots, buckets in ((0, (8,)), (4, ()), (4, (8, 0)), ({}, (8,)), ({8: -1}, (8,)), ("x", (8,))):
        with pytest.raises(UsageError, match="whole numbers above zero"):
            model.bank(slots=slots, rank_buckets=buckets)  # type: ignore[arg-type]
    with bank.lease("lora") as lease:
        for rows in ([(lease, 0)], [(lease, 1), lease], ["lora"], [(lease, 2.0)]):
            with pytest.raises(UsageError):
                bank.plan(rows)  # type: ignore[arg-type]
        with pytest.raises(AdapterError, match="3 names, and the batch 2 rows"):
            model(**tokens(2), adapter_names=bank.plan([lease, None, lease]))
        other = made(["lora"])
        with pytest.raises(UsageError, match="another model"):
            other(**tokens(1), adapter_names=bank.plan([lease]))


REFUSED: dict[str, tuple[veneer.PeftConfig, str]] = {
    "a prompt": (veneer.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "virtual tokens"),
    "a gate": (veneer.LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[7]), "row as a whole"),
    "a route": (veneer.PolyConfig(target_modules=["q_proj"], r=2, n_tasks=2, n_skills=2), "for each row anew"),
}


@pytest.mark.parametrize(("config", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_no_packed_batch_can_hold_is_refused(config: veneer.PeftConfig, reason: str) -> None:
    model = made(["lora"])
    model.add_adapter("new", config)
    model.set_requires_grad("new", False)
    bank = model.bank()
    with pytest.raises(UnsupportedError, match=reason):
        bank.register("new")
    with pytest.raises(UnsupportedError, match=reason):
        bank.lease("new")
    model.delete_adapter("new")
    check(model, bank, ["lora", None])


def test_one_in_training_is_refused() -> None:
    model = made(["lora"])
    model.add_adapter("new", KINDS["dora"])
    with pytest.raises(UnsupportedError, match="is being trained"):
        model.bank().register("new")


def test_a_leased_adapter_stays_on_the_model(tmp_path: Path) -> None:
    model = made(["lora", "dora"])
    model.save_pretrained(tmp_path)
    bank = model.bank(slots=4)
    lease = bank.lease("lora")
    changes = {
        "delete": lambda: model.delete_adapter("lora"),
        "rename": lambda: model.rename_adapter("lora", "other"),
        "replace": lambda: model.load_adapter(tmp_path / "lora", "lora"),
        "merge": lambda: model.merge_adapter(["lora"]),
        "unload": lambda: model.unload(),
        "move": lambda: model.half(),
    }
    for change in changes.values():
        with pytest.raises(AdapterError, match="leased from a bank"):
            change()
    model.load_adapter(tmp_path / "dora", "new")
    model.delete_adapter("new")
    check(model, bank, ["lora", "dora", None])
    lease.release()
    model.delete_adapter("lora")
    assert "lora" not in bank
    with pytest.raises(UnknownAdapterError):
        bank.lease("lora")


def test_another_adapter_of_the_same_name_is_another(tmp_path: Path) -> None:
    model = made(["lora", "dora"])
    bank = model.bank(slots=4)
    check(model, bank, ["lora", "dora"])
    model.delete_adapter("lora")
    model.add_adapter("lora", KINDS["lora"], seed=9)
    enlarge(model, "lora", 9)
    model.set_requires_grad("lora", False)
    check(model, bank, ["lora", "dora"])
    model.save_pretrained(tmp_path)
    enlarge(model, "lora", 10)
    check(model, bank, ["dora", "lora"])
    model.load_adapter(tmp_path / "lora", "lora")
    check(model, bank, ["dora", "lora"])


def test_adapters_that_come_and_go_leave_nothing_behind(tmp_path: Path) -> None:
    made(["lora", "dora"]).save_pretrained(tmp_path)
    model = veneer.PeftModel(build("llama")).eval()
    bank, batch = model.bank(slots=4), tokens(2)
    seen: list[weakref.ref[Any]] = []
    for turn in range(3):
        for name in ("lora", "dora"):
            model.load_adapter(tmp_path / name, name)
            with bank.lease(name) as lease:
                found = model(**batch, adapter_names=bank.plan([lease, None])).logits
            assert gap(found[0], alone(model, name, **batch)[0]) < CLOSE
            seen += [weakref.ref(model.get_base_model().model.layers[0].self_attn.q_proj)]
            seen += [weakref.ref(model.adapters.get(name))]
            model.delete_adapter(name)
        if not turn:
            nbytes = bank.status().nbytes
            model.double()
            model.float()
    assert bank.status().nbytes == nbytes
    assert name not in bank
    del lease, found
    gc.collect()
    model.load_adapter(tmp_path / "lora", "lora")
    bank.register("lora")
    assert not any(reference() for reference in seen)


@pytest.mark.parametrize("leased", [False, True])
def test_an_adapter_that_could_not_be_written_is_written_again(
    model: veneer.PeftModel, leased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank, batch, original, count = model.bank(slots=4), tokens(2), LayerSlots.write, [0]
    first = bank.lease("lora")
    plan = bank.plan([first, None])
    model(**batch, adapter_names=plan)
    if leased:
        model.train().eval()

    def write(*arguments: Any) -> int:
        count[0] += 1
        if count[0] == 3:
            raise MemoryError
        return original(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(LayerSlots, "write", write)
        with pytest.raises(MemoryError):
            model(**batch, adapter_names=plan) if leased else bank.lease("dora")
    assert gap(model(**batch, adapter_names=plan).logits[0], alone(model, "lora", **batch)[0]) < CLOSE
    first.release()
    check(model, bank, ["dora", None, "lora"])


def test_registrations_beside_deletions() -> None:
    model = made(["lora", "dora"])
    bank, errors = model.bank(slots=4), []
    stop = threading.Event()

    def register() -> None:
        while not stop.is_set():
            try:
                bank.register("dora")
                bank.remove("dora")
            except (UnknownAdapterError, UnsupportedError):  # it is gone, or new and not frozen yet
                continue
            except BaseException as error:
                errors.append(error)
                return

    thread = threading.Thread(target=register)
    thread.start()
    for turn in range(10):
        model.delete_adapter("dora")
        model.add_adapter("dora", KINDS["dora"], seed=turn)
        model.set_requires_grad("dora", False)
    stop.set()
    thread.join()
    assert not errors


CHANGES = {
    "an adapter": lambda model: model.get_base_model().model.layers[0].mlp.down_proj.lora_B["lora"].weight.mul_(2),
    "its data": lambda model: model.get_base_model().model.layers[0].mlp.down_proj.lora_B["lora"].weight.data.mul_(2),
    "the model's dtype": lambda model: model.double(),
    "the mode": lambda model: model.train().eval(),
    "a merge": lambda model: model.merge_adapter(["dora"]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_between_leases_is_seen(change: Any) -> None:
    model = made(["lora", "dora", "ia3"])
    bank = model.bank(slots=4)
    names = ["lora", "dora", None, "ia3"]
    check(model, bank, names)
    change(model)
    check(model, bank, names)


def test_weights_that_are_written_by_their_memory_while_leased_are_seen() -> None:
    model = made(["lora", "dora"])
    bank, batch = model.bank(slots=4), tokens(2)
    plan = bank.plan([bank.lease("lora"), bank.lease("dora")])
    before = model(**batch, adapter_names=plan).logits
    CHANGES["its data"](model)
    after = model(**batch, adapter_names=plan).logits
    assert gap(after[0], before[0]) > 1e-3
    assert gap(after[0], alone(model, "lora", **batch)[0]) < CLOSE
    assert gap(after[1], before[1]) < CLOSE


@pytest.mark.parametrize("arch", ["gpt2", "opt", "bert", "t5", "vit"])
def test_other_architectures(arch: str) -> None:
    from tests.random_adapters import config

    model = veneer.PeftModel(build(arch))
    for rank, name in ((2, "a"), (9, "b")):
        model.add_adapter(name, config(arch, r=rank, task_type=None))
        enlarge(model, name, rank)
        model.set_requires_grad(name, False)
    model.eval()
    bank, batch = model.bank(slots=2), inputs(arch)
    leases = {name: bank.lease(name) for name in "ab"}
    for names in (["a", "b"], ["b", None], ["a", "a"]):
        found = model(**batch, adapter_names=bank.plan([leases.get(name or "") for name in names])).logits
        for row, name in enumerate(names):
            assert gap(found[row], alone(model, name, **batch)[row]) < CLOSE


def test_generate_batch_takes_a_plan(model: veneer.PeftModel) -> None:
    bank = model.bank(slots=4)
    lease = bank.lease("lora")
    with pytest.raises(AdapterError, match="one name for each prompt"):
        model.generate_batch([[5, 6], [7]], adapter_names=bank.plan([(lease, 2), (None, 1)]))


def test_disabled_adapters_are_disabled_in_a_plan(model: veneer.PeftModel) -> None:
    bank, batch = model.bank(slots=4), tokens(2)
    plan = bank.plan([bank.lease("lora"), bank.lease("dora")])
    with model.disable_adapter():
        found = model(**batch, adapter_names=plan).logits
    assert torch.equal(found, alone(model, None, **batch))


def test_generate_with_beams(model: veneer.PeftModel) -> None:
    bank, batch = model.bank(slots=4), tokens(3, 4)
    options: dict[str, Any] = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False, "pad_token_id": 0}
    names = ["dora", None, "rslora"]
    plan = bank.plan([None if name is None else bank.lease(name) for name in names])
    found = model.generate(**batch, adapter_names=plan, **options)
    for row, name in enumerate(names):
        with model.disable_adapter() if name is None else model.using(name):
            expected = model.generate(**batch, **options)[row]
        assert torch.equal(found[row][: len(expected)], expected)


def test_half_precision() -> None:
    model = made(["lora", "wide", "dora", "ia3"]).to(torch.bfloat16)
    bank, batch = model.bank(slots={4: 8}), tokens(4)
    names = ["wide", "lora", "dora", "ia3"]
    found = model(**batch, adapter_names=bank.plan([bank.lease(name) for name in names])).logits
    assert found.dtype is torch.bfloat16
    for row, name in enumerate(names):
        assert gap(found[row], alone(model, name, **batch)[row]) < 0.05


def test_gradients_flow_through_what_a_bank_computes(model: veneer.PeftModel) -> None:
    bank, batch = model.bank(slots=4), tokens(2)
    plan = bank.plan([bank.lease("lora"), bank.lease("dora")])
    embeds = model.get_input_embeddings()(batch["input_ids"])
    with torch.enable_grad():
        embeds.requires_grad_(True)
        logits = model(inputs_embeds=embeds, adapter_names=plan).logits
        (grad,) = torch.autograd.grad(logits[0].sum(), embeds)
    assert bool(grad[0].any())
    assert not bool(grad[1].any())
    assert gap(logits, model(**batch, adapter_names=plan).logits) < CLOSE


def test_threads_that_join_and_leave_while_others_compute() -> None:
    names = ["lora", "rslora", "dora", "head", "bias", "ia3", "vera"]
    model = made(names)
    bank, batch = model.bank(slots={4: 3, 8: 2}), tokens(2)
    expected = {name: alone(model, name, **batch) for name in names}
    errors: list[BaseException] = []
    full = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        try:
            with torch.no_grad():
                for _ in range(12):
                    pair = [names[i] for i in torch.randint(len(names), (2,), generator=generator)]
                    try:
                        with bank.lease(pair[0]) as first, bank.lease(pair[1]) as second:
                            found = model(**batch, adapter_names=bank.plan([first, second])).logits
                    except BankFullError:
                        full.append(pair)
                        continue
                    for row, name in enumerate(pair):
                        assert gap(found[row], expected[name][row]) < CLOSE
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(full) < 40
    status = bank.status()
    assert status.leases == 0
    assert not model.adapters.active_selection.underway._calls
