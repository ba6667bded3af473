"""The data of a run, as plain dataclasses: written as JSON and read back without loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from types import UnionType
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin, get_type_hints

from veneer.benching.decide.cost_model import BreakEven, ServingPlan
from veneer.benching.measure.statistics import Spread, spread
from veneer.errors import CorruptFileError
from veneer.printing import AsJson

if TYPE_CHECKING:
    from typing_extensions import Self


SCHEMA = 1
# The ways of running the model that are compared, in the order in which they are shown.
VARIANTS: Mapping[str, str] = {
    "base": "base alone",
    "merged": "merged",
    "resident": "merged copy kept",
    "unmerged": "unmerged",
    "switching": "switching",
    "mixed": "mixed batch",
}

T = TypeVar("T")


@dataclass(frozen=True)
class Figure:
    """One quantity of one variant, measured one time or more.

    Attributes:
        quantity: "first" (seconds to the first token), "decode" and "forward" (seconds of a step), "switch",
            "attach", "merge", "unmerge", "keep", "load" and "import" (seconds), "peak", "serving", "weights" and "disk"
            (bytes).
        variant: the model measured: one of ``VARIANTS``; for bytes also "kept", or "adapter " and its name.
        unit: "s" or "B".
        samples: in the order in which they were taken. Those of the same round of several variants correspond.
        batch: rows.
        length: tokens (or frames) of a row; ``None`` where the input has one size.
    """

    quantity: str
    variant: str
    unit: str
    samples: tuple[float, ...]
    batch: int | None = None
    length: int | None = None

    @property
    def key(self) -> tuple[str, str, int, int]:
        """The key by which another run's figure is the same."""
        return self.quantity, self.variant, self.batch or 0, self.length or 0

    @property
    def spread(self) -> Spread:
        """Median and interval."""
        return spread(self.samples)


@dataclass(frozen=True)
class MeasuredAdapter:
    """An adapter that was measured: name, path or id, method, bytes on disk, number of layers that it adapts."""

    name: str
    origin: str
    method: str
    nbytes: int
    layers: int


@dataclass(frozen=True)
class Setup:
    """The base, the adapters and the settings of a run.

    Attributes:
        path: as given.
        base: the base model's path or id.
        model_class: its class.
        kind: "causal", "seq2seq" or "forward".
        unit: of a row's length: "token", "image" or "frame".
        parameters: how many the base has.
        dtype: of its weights.
        device: of the models.
        adapters: the adapters measured; the hottest first.
        batch: rows.
        lengths: tokens of a row; empty where the input has one size.
        new_tokens: tokens of an answer.
        repeats: timed rounds.
        prompts: where the text came from.
        texts: the file on which perplexity was measured; empty without one.
    """

    path: str
    base: str
    model_class: str
    kind: str
    unit: str
    parameters: int
    dtype: str
    device: str
    adapters: tuple[MeasuredAdapter, ...]
    batch: tuple[int, ...]
    lengths: tuple[int, ...]
    new_tokens: int
    repeats: int
    prompts: str
    texts: str = ""


@dataclass(frozen=True)
class Machine:
    """The machine of a run.

    Attributes:
        cpu: its name.
        cores: physical ones.
        threads: those that torch computes with.
        memory: bytes.
        accelerator: a GPU's name and memory, if the run used one.
        system: the operating system.
        versions: package -> version, Python included.
    """

    cpu: str
    cores: int
    threads: int
    memory: int
    accelerator: str | None
    system: str
    versions: dict[str, str]


@dataclass(frozen=True)
class Fidelity:
    """The distance of one adapter's merged answers from its unmerged ones.

    Attributes:
        adapter: its name.
        prompts: inputs compared.
        positions: places at which logits were compared.
        drift: the largest difference of a logit, as a share of the largest logit.
        share_of_effect: the mean difference as a share of the adapter's own change of the base's answers.
        agreement: the share of positions with the same most likely token (or class); ``None`` without logits.
        same_texts: how many greedy answers are the same; ``None`` without decode.
    """

    adapter: str
    prompts: int
    positions: int
    drift: float
    share_of_effect: float
    agreement: float | None
    same_texts: int | None = None


@dataclass(frozen=True)
class Perplexity:
    """The perplexity of the base, or of one adapter on it: lower where it predicts the texts better.

    Attributes:
        adapter: its name; empty for the base alone.
        unmerged: ``exp`` of the mean negative log-likelihood of a token.
        merged: the same with the adapter merged; ``None`` for the base.
        tokens: how many were predicted.
        window: the most tokens that the model saw at a time.
    """

    adapter: str
    unmerged: float
    merged: float | None
    tokens: int
    window: int


@dataclass(frozen=True)
class Recommendation:
    """The advice, with its reasons in numbers.

    Attributes:
        decision: "merge", "unmerged" or "merge-hottest".
        headline: the same as a sentence.
        reasons: why, a sentence each.
        cautions: what else to know.
        plans: every plan that was weighed.
        chosen: the index of the recommended plan.
        compared: the index of the merging plan that ``break_even`` is about.
        break_even: when that plan's merges are earned back.
        traffic: adapter -> its share, the hottest first.
        memory: the budget in bytes.
        requests_per_change: between two changes of the adapters; ``None`` when they never change.
        in_flight: requests answered at the same time.
        margin: gains below this share count as noise.
        call: the call that does it on a model with these adapters; empty where none does.
    """

    decision: str
    headline: str
    reasons: tuple[str, ...]
    cautions: tuple[str, ...]
    plans: tuple[ServingPlan, ...]
    chosen: int
    compared: int
    break_even: BreakEven
    traffic: dict[str, float]
    memory: float
    requests_per_change: float | None
    in_flight: int
    margin: float
    call: str = ""


@dataclass(frozen=True)
class BenchData(AsJson):
    """The data of a run of :func:`veneer.bench`: figures, and the recommendation that follows from them.

    Attributes:
        made: when, in UTC.
        setup: base, adapters and settings.
        machine: the machine of the run.
        figures: every quantity with its raw samples.
        fidelity: merged against unmerged, for each adapter.
        recommendation: the advice.
        notes: what could not be measured, and why.
        seconds: of the whole run.
        perplexity: of the base, and of each adapter; empty where no texts were given.
        schema: the version of this data's form.
    """

    made: str
    setup: Setup
    machine: Machine
    figures: tuple[Figure, ...]
    fidelity: tuple[Fidelity, ...]
    recommendation: Recommendation
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    perplexity: tuple[Perplexity, ...] = ()
    schema: int = field(default=SCHEMA)

    def find(self, quantity: str, variant: str, batch: int = 0, length: int = 0) -> Figure | None:
        """Find a figure, if it was measured."""
        return find(self.figures, quantity, variant, batch, length)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "the report") -> Self:
        """Read what :meth:`to_dict` gave; raise ``CorruptFileError`` when the values are no report."""
        hint = "Give the report.json that `veneer bench --out` wrote."
        if not isinstance(values, Mapping) or "figures" not in values or "schema" not in values:
            raise CorruptFileError(f"{where} is no report of `veneer bench`.", hint=hint)
        if values["schema"] != SCHEMA:
            raise CorruptFileError(
                f"{where} is of schema {values['schema']}; this version reads {SCHEMA}.", hint="Measure again."
            )
        try:
            return from_json(cls, values)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise CorruptFileError(f"{where} is a damaged report: {error}.", hint=hint) from error


def find(figures: Iterable[Figure], quantity: str, variant: str, batch: int = 0, length: int = 0) -> Figure | None:
    """Find a figure among ``figures``."""
    return next((f for f in figures if f.key == (quantity, variant, batch, length)), None)


def from_json(kind: type[T], values: Mapping[str, Any]) -> T:
    """Make a dataclass from its JSON object, unknown keys left out."""
    hints = get_type_hints(kind)
    known = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: _from_json_value(hints[name], value) for name, value in values.items() if name in known})


def _from_json_value(hint: Any, value: Any) -> Any:
    if isinstance(hint, type) and is_dataclass(hint):
        return from_json(hint, value)
    if get_origin(hint) is tuple and isinstance(value, list):
        return tuple(_from_json_value(get_args(hint)[0], item) for item in value)
    if not isinstance(value, _json_types(hint)) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{value!r} is no {hint}")
    return value


def _json_types(hint: Any) -> tuple[type, ...]:
    """Return the types that JSON may hold for a hint; a whole float is read as an int."""
    parts = get_args(hint) if get_origin(hint) is UnionType else (hint,)
    kinds = [get_origin(part) or part for part in parts]
    return (*kinds, int) if float in kinds else tuple(kinds)
