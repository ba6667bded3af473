"""The registry: a name moves at once, what runs keeps its version, and what goes leaves nothing."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
from pathlib import Path

import pytest

from tests.serving.registry_world import World, run
from veneer.errors import NonFiniteError, OutputError
from veneer.serving.audit import LOGGER, audit, log_to
from veneer.serving.auth import ANONYMOUS, Caller
from veneer.serving.registry import RegistryOptions
from veneer.serving.registry_database import RegistryDatabase, StoredName, StoredVersion
from veneer.serving.registry_types import Registration, State
from veneer.serving.serving_errors import (
    AdapterBusyError,
    AdapterExistsError,
    AdapterInvalidError,
    AdapterLoadingError,
    AdapterRemovedError,
    InvalidRequestError,
    ModelNotFoundError,
    NotAllowedError,
    SourceFailedError,
)
from veneer.serving.store import StoreLimits


def test_a_name_is_registered_asked_for_and_removed(tmp_path: Path) -> None:
    world = World(tmp_path)

    async def work() -> None:
        info = await world.register("pirate")
        assert (info.name, info.state, info.resident, info.leases) == ("pirate", State.READY, True, 0)
        assert info.current is not None
        assert info.current.number == 1
        assert str(tmp_path) not in info.current.source
        assert set(info.load_seconds) == {"fetch", "room", "verify", "engine"}
        assert await world.ask("pirate") == info.current.digest
        assert await world.ask(f"pirate@{info.current.digest}") == info.current.digest
        assert await world.ask(f"pirate@{info.current.digest[7:17]}") == info.current.digest
        assert world.registry.adapters(ANONYMOUS) == [world.registry.adapter("pirate", ANONYMOUS)]
        assert await world.registry.remove("pirate", ANONYMOUS)
        assert world.folders() == set()
        assert not world.engine.loaded
        with pytest.raises(AdapterRemovedError):
            await world.ask("pirate")
        world.time += 601
        with pytest.raises(ModelNotFoundError):
            await world.ask("pirate")
        assert len(world.registry._keeper) == 0

    run(world, work())


def test_the_base_is_no_adapter(tmp_path: Path) -> None:
    world = World(tmp_path)

    async def work() -> None:
        with world.registry.use("base", ANONYMOUS) as use:
            assert (use.digest, use.adapter, use.label) == (None, None, "base")
        with pytest.raises(AdapterExistsError):
            await world.register("base")
        with pytest.raises(ModelNotFoundError):
            await world.ask("base@123456")

    run(world, work())


def test_an_unknown_name_is_never_the_base(tmp_path: Path) -> None:
    world = World(tmp_path)

    async def work() -> None:
        await world.register("pirate")
        for name in ("pirat", "", "pirate@ffffff", "pirate@", "../pirate", "base/", "x" * 5000):
            with pytest.raises(ModelNotFoundError):
                await world.ask(name)
        with pytest.raises(ModelNotFoundError, match="Did you mean 'pirate'"):
            await world.ask("pirat")

    run(world, work())


def test_other_bytes_replace_only_when_asked_and_the_running_ones_stay(tmp_path: Path) -> None:
    world = World(tmp_path)

    async def work() -> None:
        one = (await world.register("a", 0)).current
        again = await world.register("a", 0)
        assert again.current == one
        with pytest.raises(AdapterExistsError):
            await world.register("a", 1)
        assert one is not None
        running = asyncio.ensure_future(world.ask("a", seconds=0.05))
        await asyncio.sleep(0.01)
        two = (await world.register("a", 1, replace=True)).current
        assert two is not None
        assert two.number == 2
        assert await world.ask("a") == two.digest
        assert world.registry.adapter("a", ANONYMOUS).versions[0].state == State.DRAINING
        assert await running == one.digest
        await world.settled()
        assert set(world.engine.loaded) == {two.digest}
        assert world.registry.adapter("a", ANONYMOUS).versions[0].state == State.READY
        assert await world.ask(f"a@{one.digest}") == one.digest

    run(world, work())


def test_rollback_moves_back_and_forth(tmp_path: Path) -> None:
    world = World(tmp_path)

    async def work() -> None:
        digests = []
        for number in range(3):
            info = await world.register("a", number, replace=True)
            assert info.current is not None
            digests.append(info.current.digest)
        shutil.rmtree(tmp_path / "sources")
        info = await world.registry.rollback("a", ANONYMOUS)
        assert info.current is not None
        assert info.current.digest == await world.ask("a") == digests[1]
        await world.registry.rollback("a", ANONYMOUS, to=digests[2])
        assert await world.ask("a") == digests[2]
        await world.registry.rollback("a", ANONYMOUS, to=digests[0][7:20])
        assert await world.ask("a") == digests[0]
        with pytest.raises(ModelNotFoundError, match="no earlier version"):
            await world.registry.rollback("a", ANONYMOUS)
        with pytest.raises(ModelNotFoundError):
            await world.registry.rollback("a", ANONYMOUS, to="ffffffff")

    run(world, work())


def test_a_replacement_that_fails_leaves_the_name_where_it_is(tmp_path: Path) -> None:
    world = World(tmp_path)

    async def work() -> None:
        one = (await world.register("a", 0)).current
        assert one is not None
        bad = await world.digest(1)
        world.engine.refused[bad] = NonFiniteError("It holds NaN.")
        with pytest.raises(AdapterInvalidError, match="NaN"):
            await world.register("a", 1, replace=True)
        info = world.registry.adapter("a", ANONYMOUS)
        assert (info.current, info.state, info.error) == (one, State.READY, "It holds NaN.")
        assert await world.ask("a") == one.digest
        await world.settled()
        assert world.folders() == {one.digest[7:]}
        with pytest.raises(SourceFailedError):
            await world.registry.register(Registration("a", f"{tmp_path}/sources/none", replace=True), ANONYMOUS)
        assert await world.ask("a") == one.digest

    run(world, work())


def test_a_name_that_never_came_to_be_tells_why(tmp_path: Path) -> None:
    world = World(tmp_path)

    async def work() -> None:
        (world.sources[0] / "adapter_model.safetensors").write_bytes(b"short")
        info = world.registry.begin(Registration("a", str(world.sources[0])), ANONYMOUS)
        assert (info.state, info.current) == (State.LOADING, None)
        with pytest.raises(AdapterLoadingError):
            await world.ask("a")
        await asyncio.gather(*world.registry._names["a"].tasks, return_exceptions=True)
        await asyncio.sleep(0)
        info = world.registry.adapter("a", ANONYMOUS)
        assert info.state == State.FAILED
        assert "damaged" in (info.error or "")
        assert world.registry.adapters(ANONYMOUS) == [info]
        with pytest.raises(AdapterInvalidError, match="damaged"):
            await world.ask("a")
        assert world.folders() == set()
        await world.register("a", 1)
        assert await world.ask("a")

    run(world, work())


def test_one_digest_under_two_names_is_one_copy_that_stays_for_the_other(tmp_path: Path) -> None:
    world = World(tmp_path)

    async def work() -> None:
        one, two = await asyncio.gather(world.register("a", 0), world.register("b", 0))
        assert one.current is not None
        assert two.current is not None
        assert one.current.digest == two.current.digest
        assert world.engine.loads[one.current.digest] == 1
        await world.registry.remove("a", ANONYMOUS)
        assert await world.ask("b") == one.current.digest
        assert len(world.folders()) == 1
        await world.registry.remove("b", ANONYMOUS)
        assert world.folders() == set()

    run(world, work())


def test_a_removal_waits_refuses_or_ends_what_runs(tmp_path: Path) -> None:
    world = World(tmp_path)

    async def forced(name: str) -> str:
        with world.registry.use(name, ANONYMOUS) as use:
            while not use.revoked.is_set():
                await asyncio.sleep(0.01)
            use.check()
        return "never"

    async def work() -> None:
        await world.register("a")
        running = asyncio.ensure_future(world.ask("a", seconds=0.1))
        await asyncio.sleep(0.01)
        with pytest.raises(AdapterBusyError):
            await world.registry.remove("a", ANONYMOUS)
        assert not await world.registry.remove("a", ANONYMOUS, drain=0.02)
        assert world.registry.adapter("a", ANONYMOUS).state == State.DRAINING
        assert world.registry.adapter("a", ANONYMOUS).leases == 1
        with pytest.raises(AdapterRemovedError):
            await world.ask("a")
        await running
        await world.settled()
        assert world.folders() == set()
        with pytest.raises(AdapterRemovedError):
            world.registry.adapter("a", ANONYMOUS)
        await world.register("a")
        running = asyncio.ensure_future(world.ask("a", seconds=0.05))
        await asyncio.sleep(0.01)
        assert await world.registry.remove("a", ANONYMOUS, drain=5)
        await running
        await world.register("a")
        stuck = asyncio.ensure_future(forced("a"))
        await asyncio.sleep(0.01)
        assert await world.registry.remove("a", ANONYMOUS, drain=0.01, force=True)
        with pytest.raises(AdapterRemovedError):
            await stuck
        assert world.folders() == set()

    run(world, work())


def test_a_name_registered_again_while_its_last_version_drains_is_the_new_one(tmp_path: Path) -> None:
    world = World(tmp_path)

    async def work() -> None:
        one = (await world.register("a", 0)).current
        running = asyncio.ensure_future(world.ask("a", seconds=0.05))
        await asyncio.sleep(0.01)
        await world.registry.remove("a", ANONYMOUS, drain=0)
        two = (await world.register("a", 1)).current
        assert one is not None
        assert two is not None
        assert await world.ask("a") == two.digest
        assert await running == one.digest
        await world.settled()
        assert world.folders() == {two.digest[7:]}

    run(world, work())


def test_a_removal_ends_a_registration_under_way(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.engine.delay = 0.05

    async def work() -> None:
        task = asyncio.ensure_future(world.register("a"))
        await asyncio.sleep(0.02)
        assert await world.registry.remove("a", ANONYMOUS)
        with pytest.raises(AdapterRemovedError, match="removed meanwhile"):
            await task
        await asyncio.sleep(0.1)
        await world.settled()
        assert world.folders() == set()
        assert world.registry.adapters(ANONYMOUS) == []

    run(world, work())


def test_a_restart_keeps_names_versions_aliases_and_pins(tmp_path: Path) -> None:
    world = World(tmp_path)

    async def before() -> None:
        await world.register("a", 0)
        await world.register("a", 1, replace=True)
        await world.register("acme/b", 2, pin=True)
        world.registry.alias("latest", "a", ANONYMOUS)
        with pytest.raises(OutputError, match="another server"):
            await World(tmp_path).registry.open()

    async def after() -> None:
        info = again.registry.adapter("a", ANONYMOUS)
        assert [version.number for version in info.versions] == [1, 2]
        assert info.current == info.versions[1]
        assert info.aliases == ("latest",)
        assert again.registry.adapter("acme/b", ANONYMOUS).pinned
        assert await again.ask("latest") == info.versions[1].digest
        await again.registry.rollback("a", ANONYMOUS)
        assert await again.ask("a") == info.versions[0].digest
        await again.register("a", 2, replace=True)
        assert again.registry.adapter("a", ANONYMOUS).versions[-1].number == 3
        await again.settled()
        assert set(again.engine.loaded) == {again.registry.adapter("a", ANONYMOUS).current.digest}  # type: ignore[union-attr]

    run(world, before())
    shutil.rmtree(tmp_path / "sources" / "0")
    again = World(tmp_path)
    run(again, after())


def test_bytes_that_are_gone_after_a_restart_are_an_error(tmp_path: Path) -> None:
    world = World(tmp_path)
    run(world, world.register("a"))
    for folder in world.folders():
        (tmp_path / "store" / folder).chmod(0o755)
        shutil.rmtree(tmp_path / "store" / folder)
    again = World(tmp_path)

    async def work() -> None:
        assert again.registry.adapter("a", ANONYMOUS).state == State.FAILED
        with pytest.raises(AdapterInvalidError, match="not in the store"):
            await again.ask("a")
        await again.register("a")
        assert await again.ask("a")

    run(again, work())


def test_a_file_of_names_that_is_damaged_is_told(tmp_path: Path) -> None:
    world = World(tmp_path)
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "registry.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(Exception, match="is damaged"):
        asyncio.run(world.registry.open())


def test_a_change_that_the_disk_cannot_hold_is_told_and_undone(tmp_path: Path) -> None:
    database = RegistryDatabase(tmp_path)
    database.open()
    database._open.execute("PRAGMA max_page_count = 5")
    versions = tuple(StoredVersion(number, "x" * 900, 0.0, "") for number in range(50))
    for _ in range(2):
        with pytest.raises(OutputError, match="disk is full"):
            database.save(StoredName("large", 1, 2, False, versions))
    small = StoredName("small", 1, 2, False, ())
    database.save(small)
    assert database.names() == [small]
    database.close()


def test_what_a_cut_off_registration_left_is_tidied(tmp_path: Path) -> None:
    world = World(tmp_path)
    run(world, world.register("a"))
    folder = next(iter(world.folders()))
    (tmp_path / "store" / "registry.sqlite").unlink()
    again = World(tmp_path)
    run(again, asyncio.sleep(0))
    assert folder not in again.folders()


def test_aliases_and_names_do_not_meet(tmp_path: Path) -> None:
    world = World(tmp_path)

    async def work() -> None:
        await world.register("a", 0)
        await world.register("b", 1)
        world.registry.alias("latest", "a", ANONYMOUS)
        first = await world.ask("latest")
        world.registry.alias("latest", "b", ANONYMOUS)
        assert await world.ask("latest") == await world.ask("b") != first
        for taken in ("a", "base"):
            with pytest.raises(AdapterExistsError):
                world.registry.alias(taken, "b", ANONYMOUS)
        with pytest.raises(AdapterExistsError):
            await world.register("latest")
        with pytest.raises(InvalidRequestError):
            world.registry.alias("../x", "b", ANONYMOUS)
        assert await world.registry.remove("latest", ANONYMOUS)
        with pytest.raises(ModelNotFoundError):
            await world.ask("latest")
        world.registry.alias("latest", "b", ANONYMOUS)
        await world.registry.remove("b", ANONYMOUS)
        with pytest.raises(ModelNotFoundError):
            await world.ask("latest")

    run(world, work())


def test_a_key_sees_and_manages_its_own(tmp_path: Path) -> None:
    world = World(tmp_path)
    acme = Caller("k1", tenant="acme", adapters=("acme/*", "shared"))
    user = Caller("k2", scopes=frozenset({"infer"}), adapters=("shared",))

    async def work() -> None:
        await world.register("shared", 0)
        await world.register("acme/x", 1, caller=acme)
        await world.register("other/x", 2)
        assert [info.name for info in world.registry.adapters(acme)] == ["shared", "acme/x"]
        assert await world.ask("shared", user)
        for name in ("other/x", "nothing"):
            with pytest.raises(ModelNotFoundError) as caught:
                await world.ask(name, acme)
            assert "other" not in (caught.value.hint or "")
        for name in ("shared", "acme/y"):
            with pytest.raises(NotAllowedError):
                await world.register(name, 1, caller=user)
        with pytest.raises(NotAllowedError):
            await world.register("shared", 1, caller=acme, replace=True)
        with pytest.raises(NotAllowedError):
            await world.registry.remove("shared", acme)
        with pytest.raises(ModelNotFoundError):
            await world.registry.remove("other/x", acme)
        with pytest.raises(ModelNotFoundError):
            await world.ask("base", user)
        await world.registry.remove("other/x", ANONYMOUS)
        with pytest.raises(ModelNotFoundError):
            await world.ask("other/x", acme)

    run(world, work())


def test_sources_that_fail_are_not_asked_for_each_request(tmp_path: Path) -> None:
    world = World(tmp_path)
    missing = Registration("a", f"{tmp_path}/sources/none")

    async def work() -> None:
        for _ in range(2):
            with pytest.raises(SourceFailedError):
                await world.registry.register(missing, ANONYMOUS)
        world.sources.append(tmp_path / "sources" / "none")
        shutil.copytree(world.sources[0], world.sources[-1])
        with pytest.raises(SourceFailedError) as caught:
            await world.registry.register(missing, ANONYMOUS)
        assert caught.value.retry_after is not None
        assert 0 < caught.value.retry_after <= 1

    run(world, work())


def test_where_digests_are_required_a_registration_without_one_is_refused(tmp_path: Path) -> None:
    world = World(tmp_path, options=RegistryOptions(require_digest=True))

    async def work() -> None:
        given = await world.register("operator", trusted=True)
        assert given.current is not None
        with pytest.raises(InvalidRequestError, match="which bytes") as caught:
            await world.register("a")
        assert (caught.value.param, caught.value.status, caught.value.code) == ("digest", 400, "invalid_request")
        assert "veneer digest --adapter" in str(caught.value)
        with pytest.raises(ModelNotFoundError):
            await world.ask("a")
        await world.register("a", digest=given.current.digest)
        assert await world.ask("a") == given.current.digest

    run(world, work())


def test_a_slow_source_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path, options=RegistryOptions(load_timeout=0.05))
    add = world.store._add

    async def slow(*args: object) -> object:
        await asyncio.sleep(0.2)
        return await add(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(world.store, "_add", slow)

    async def work() -> None:
        with pytest.raises(SourceFailedError, match="did not arrive"):
            await world.register("a")

    run(world, work())


def test_history_is_limited_and_what_falls_out_of_it_goes(tmp_path: Path) -> None:
    world = World(tmp_path, options=RegistryOptions(versions=2), adapters=4)

    async def work() -> None:
        for number in range(4):
            await world.register("a", number, replace=True)
        await world.settled()
        info = world.registry.adapter("a", ANONYMOUS)
        assert [version.number for version in info.versions] == [3, 4]
        assert world.folders() == {version.digest[7:] for version in info.versions}

    run(world, work())


def test_a_store_without_room_keeps_what_is_current(tmp_path: Path) -> None:
    size = sum(path.stat().st_size for path in World(tmp_path / "x").sources[0].iterdir())
    world = World(tmp_path, limits=StoreLimits(store_bytes=int(2.5 * size)))

    async def work() -> None:
        one = (await world.register("a", 0)).current
        await world.register("a", 1, replace=True)
        await world.register("b", 2)
        assert one is not None
        assert world.store.get(one.digest) is None
        with pytest.raises(ModelNotFoundError):
            await world.registry.rollback("a", ANONYMOUS)
        with pytest.raises(SourceFailedError, match="no room"):
            await world.register("c", 0)
        assert await world.ask("a")
        assert await world.ask("b")

    run(world, work())


def test_five_hundred_cycles_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("veneer.serving.fetch.flush", lambda path: None)
    world = World(tmp_path)

    async def work() -> None:
        for number in range(500):
            name = f"name{number}"
            await world.register(name, number % 3)
            await world.ask(name)
            assert await world.registry.remove(name, ANONYMOUS)
        assert not world.engine.loaded
        assert world.folders() == set()
        assert world.store.used_bytes == world.residency.used_bytes == len(world.registry._keeper) == 0
        assert len(world.registry._failures) == len(world.residency._failures) == 0
        assert not world.registry._names
        assert not world.registry._leaving
        assert len(world.registry._gone) == 500
        world.time += 601
        await world.register("last")
        await world.registry.remove("last", ANONYMOUS)
        assert len(world.registry._gone) == 1
        assert len(asyncio.all_tasks()) <= 2

    run(world, work())


def test_two_hundred_replacements_under_load_answer_with_whole_versions(tmp_path: Path) -> None:
    world = World(tmp_path, residents=2, adapters=4)

    async def work() -> None:
        digests = [await world.digest(number) for number in range(4)]
        await world.register("a", 0)
        stopped = asyncio.Event()
        answers: list[str | None] = []

        async def client() -> None:
            while not stopped.is_set():
                answers.append(await world.ask("a", seconds=0.001))

        clients = [asyncio.ensure_future(client()) for _ in range(8)]
        for number in range(200):
            info = await world.register("a", (number + 1) % 4, replace=True)
            assert info.current is not None
            assert info.current.digest == digests[(number + 1) % 4]
        stopped.set()
        await asyncio.gather(*clients)
        await world.settled()
        assert set(answers) <= set(digests)
        assert len(answers) > 200
        assert set(world.engine.loaded) == {digests[0]}

    run(world, work())


def test_the_audit_log_tells_who_changed_what(tmp_path: Path) -> None:
    handler = log_to(tmp_path / "audit.jsonl")
    world = World(tmp_path)

    async def work() -> None:
        await world.register("a", 0, caller=Caller("key1"))
        await world.register("a", 1, replace=True)
        await world.registry.rollback("a", ANONYMOUS)
        world.registry.pin("a", ANONYMOUS)
        with pytest.raises(AdapterExistsError):
            await world.register("a", 2)
        await world.registry.remove("a", ANONYMOUS)
        audit("answer", id="r1", key="key1", tokens=5)

    try:
        run(world, work())
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(logging.NOTSET)
        LOGGER.propagate = True
        handler.close()
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    events = ["registered", "registered", "rolled back", "pinned", "refused", "removed", "answer"]
    assert [line["event"] for line in lines] == events
    assert lines[0]["by"] == "key1"
    assert lines[0]["digest"].startswith("sha256:")
    assert str(tmp_path) not in (tmp_path / "audit.jsonl").read_text()
