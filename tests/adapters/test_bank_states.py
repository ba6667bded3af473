"""A bank under leases, releases, deletions and replacements in any order: no row is ever another adapter's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor

import veneer
from tests.models import build, gap, tokens
from tests.random_adapters import enlarge
from veneer.errors import AdapterError, BankFullError, UnknownAdapterError

CLOSE = 1e-5
KINDS: dict[str, veneer.PeftConfig] = {
    "lora": veneer.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]),
    "higher": veneer.LoraConfig(r=4, target_modules="all-linear"),
    "wide": veneer.LoraConfig(r=9, target_modules=["v_proj", "down_proj"]),
    "dora": veneer.LoraConfig(r=3, target_modules=["q_proj"], use_dora=True),
    "ia3": veneer.IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "head": veneer.LoraConfig(r=2, target_modules=["lm_head"]),
    "embedding": veneer.LoraConfig(r=2, target_modules=["embed_tokens"]),
}
NAMES = st.sampled_from(sorted(KINDS))
MODEL = veneer.PeftModel(build("llama")).eval()
BATCH = tokens(1, 4)["input_ids"][0]


class Banks(RuleBasedStateMachine):
    """Compares each row with its adapter alone, as it was when it was leased."""

    def __init__(self) -> None:
        super().__init__()
        self.made = 0
        for name in KINDS.keys() - MODEL.peft_config.keys():
            self.add(name)
        self.bank = MODEL.bank(slots={2: 2, 4: 3})
        self.leases: list[tuple[veneer.BankLease, Tensor]] = []
        self.need_slots: set[veneer.BankLease] = set()

    def teardown(self) -> None:
        for lease, _ in self.leases:
            lease.release()
        for name in list(MODEL.peft_config):
            MODEL.delete_adapter(name)

    def add(self, name: str) -> None:
        self.made += 1
        MODEL.add_adapter(name, KINDS[name], seed=self.made)
        enlarge(MODEL, name, self.made)
        MODEL.set_requires_grad(name, False)
        MODEL.eval()

    def leased(self, name: str) -> bool:
        return any(lease.version == name for lease, _ in self.leases)

    @rule(name=NAMES, needs_slots=st.booleans())
    def lease(self, name: str, needs_slots: bool) -> None:
        full = len(self.leases) >= 4
        try:
            lease = self.bank.lease(name, needs_slots=needs_slots)
        except BankFullError:
            assert self.leases
            assert needs_slots
            return
        except UnknownAdapterError:
            assert name not in MODEL.peft_config
            return
        if needs_slots:
            self.need_slots.add(lease)
        assert not full or self.bank.status().leases == len(self.leases) + 1
        with torch.no_grad(), MODEL.using(name):
            self.leases.append((lease, MODEL(BATCH[None]).logits[0]))

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: Any) -> None:
        lease, _ = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        lease.release()

    @rule(name=NAMES)
    def replace(self, name: str) -> None:
        if self.leased(name):
            with pytest.raises(AdapterError, match="leased from a bank"):
                MODEL.delete_adapter(name)
            return
        if name in MODEL.peft_config:
            MODEL.delete_adapter(name)
        self.add(name)

    @rule(name=NAMES)
    def forget(self, name: str) -> None:
        if name not in self.bank:
            return
        if self.leased(name):
            with pytest.raises(AdapterError):
                self.bank.remove(name)
        else:
            self.bank.remove(name)

    @rule(name=NAMES)
    def prepare(self, name: str) -> None:
        if name in MODEL.peft_config:
            self.bank.prepare(name)

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), packed=st.booleans())
    def step(self, data: Any, packed: bool) -> None:
        chosen = data.draw(st.lists(st.integers(-1, len(self.leases) - 1), min_size=1, max_size=6))
        rows = [None if place < 0 else self.leases[place] for place in chosen]
        leases = [None if row is None else row[0] for row in rows]
        count, length = len(rows), len(BATCH)
        with torch.no_grad():
            if packed:
                apart = torch.block_diag(*[torch.ones(length, length)] * count).tril().bool()
                plan = self.bank.plan([(lease, length) for lease in leases])
                call: dict[str, Any] = {"attention_mask": apart[None, None]}
                call["position_ids"] = torch.arange(length).repeat(count)[None]
                found = MODEL(BATCH.repeat(count)[None], **call, adapter_names=plan).logits.view(count, length, -1)
            else:
                found = MODEL(BATCH.repeat(count, 1), adapter_names=self.bank.plan(leases)).logits
            base = None
            for row, logits in zip(rows, found, strict=True):
                if row is None and base is None:
                    with MODEL.disable_adapter():
                        base = MODEL(BATCH[None]).logits[0]
                expected = base if row is None else row[1]
                assert expected is not None
                assert gap(logits, expected) < CLOSE

    @invariant()
    def each_slot_has_one_tenant(self) -> None:
        table, status = self.bank._table, self.bank.status()
        assert status.leases == len(self.leases)
        slots = [(home.bucket, slot) for home in table.residences.values() for slot in home.slots]
        assert len(slots) == len(set(slots)) == sum(status.used.values())
        places = [home.place for home in table.residences.values()]
        assert len(places) == len(set(places))
        for tenant, home in table.residences.items():
            assert all(table._tenants[home.bucket][slot] is tenant for slot in home.slots)
        leased = {lease.version for lease, _ in self.leases}
        beside = {entry.version for entry in self.bank._beside}
        assert beside <= leased
        assert leased - beside <= set(status.resident)
        assert not beside & {lease.version for lease, _ in self.leases if lease in self.need_slots}


TestBanks = Banks.TestCase
TestBanks.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
