"""`ClusterConfig`: everything a deployment may set, read strictly from one YAML file.

Owns: the keys, their units, defaults and cross-checks; which defaults make a laptop work (one router, one prefill and
one decode worker on the CPU, serving the bundled model). Does not own: what each part does with its values. A key that
is not known is an error that names the nearest one; relative paths count from the file they stand in.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NewType

from cluster.errors import ClusterError
from cluster.synthetic import model_folder

DEFAULT_MAX_CONTEXT = 16384
"""Longest context that is promised unasked: V4-Flash's own million would size every pool for it."""

BUNDLED_MODEL = Path(__file__).resolve().parents[1] / "deploy" / "demo" / "dsv4-nano"
"""The checkpoint that the repository carries; the default of every command that wants a model."""

NumBytes = NewType("NumBytes", int)
"""Bytes; YAML accepts an integer or a number with a unit (`512MiB`, `2GB`)."""

Seconds = NewType("Seconds", float)
"""Seconds; YAML accepts a number or one with a unit (`500ms`, `30s`, `10m`)."""

_BYTE_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BYTE_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SECOND_UNITS = {"": 1.0, "MS": 1e-3, "S": 1.0, "M": 60.0, "H": 3600.0}
_QUANTITY = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*$")


Preload = NewType("Preload", str)
"""`none`, `prefix`, or a file; YAML's relative paths count from its own folder."""


class ConfigError(ClusterError):
    """A setting is unusable. `key` is its dotted path, `source` the file it came from."""

    def __init__(self, source: str, key: str, problem: str) -> None:
        super().__init__(f"{source}: {key}: {problem}" if key else f"{source}: {problem}")
        self.source, self.key, self.problem = source, key, problem


class Device(enum.Enum):
    """Where workers compute; AUTO takes GPUs when Ray sees any."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class PrecisionMode(enum.Enum):
    """NATIVE computes as the checkpoint was trained to run (FP8 KV and activations); FP32 turns every cast off."""

    NATIVE = "native"
    FP32 = "fp32"


class Effort(enum.Enum):
    """How the checkpoint spells reasoning effort in its prompt; AUTO goes by the checkpoint's name and date."""

    AUTO = "auto"
    NONE = "none"
    PREVIEW = "preview"
    REFRESH = "refresh"


@dataclass(frozen=True, slots=True)
class RouterSettings:
    """The HTTP front door."""

    host: str = "127.0.0.1"
    """Address to listen on. The default is reachable from this machine only; there is no TLS."""
    port: int = 8000
    """TCP port; 0 takes a free one."""
    api_keys: tuple[str, ...] = ()
    """Accepted bearer tokens; empty accepts everyone."""
    request_deadline: Seconds = Seconds(600.0)
    """Longest life of one request; also the cap of what a client may ask for."""
    max_concurrent: int = 1024
    """Requests in flight before clients get 429."""
    drain: Seconds = Seconds(5.0)
    """Time that running requests get to finish when the cluster stops."""


@dataclass(frozen=True, slots=True)
class PrefillSettings:
    """Workers that compute prompts."""

    count: int = 1
    """Number of prefill workers."""
    gpus: float | None = None
    """GPUs of one worker; a fraction shares one; unset divides the GPUs that Ray has among all workers."""
    threads: int = 1
    """CPU threads of one worker's maths."""
    kv_budget: NumBytes = NumBytes(256 * 2**20)
    """Bytes of KV pools of one worker."""
    chunk_tokens: int = 512
    """Prompt tokens computed per step, over all prompts in it."""
    max_running: int = 8
    """Prompts in progress at once."""
    port: int = 0
    """gRPC port of the first worker, counted up for the others; 0 takes free ones."""


@dataclass(frozen=True, slots=True)
class DecodeSettings:
    """Workers that generate."""

    count: int = 1
    """Number of decode workers."""
    gpus: float | None = None
    """GPUs of one worker; a fraction shares one; unset divides the GPUs that Ray has among all workers."""
    threads: int = 1
    """CPU threads of one worker's maths."""
    kv_budget: NumBytes = NumBytes(512 * 2**20)
    """Bytes of KV pools of one worker."""
    max_running: int = 16
    """Requests in one decode batch."""
    max_waiting: int = 256
    """Requests admitted beyond that before the worker answers that it is full."""
    lease: Seconds = Seconds(30.0)
    """How long a grant lives without news from prefill."""
    port: int = 0
    """gRPC port of the first worker, counted up for the others; 0 takes free ones."""
    full_pages: int | None = None
    """Pages of the growing pools, instead of what `kv_budget` buys; fewer make requests retract each other."""
    window_pages: int | None = None
    """Pages of the window pool, instead of what `kv_budget` buys."""
    slots: int | None = None
    """Request slots, instead of `max_running`."""


class Admission(enum.Enum):
    """RESERVE promises a request prompt and `max_tokens`; PREDICTED what recent requests needed, and retracts."""

    RESERVE = "reserve"
    PREDICTED = "predicted"


@dataclass(frozen=True, slots=True)
class RetractSettings:
    """When decode workers take requests out of their batch, and where those wait."""

    admission: Admission = Admission.RESERVE
    """reserve: pages never run out; predicted: more requests at once, and a wrong guess costs a retract."""
    extra_requests: int = 0
    """predicted: requests admitted beyond the request slots; who finds no slot on arrival is parked."""
    horizon_steps: int = 64
    """A shortage frees enough for this many steps of the remaining batch."""
    max_retracts: int = 4
    """Retracts of one request after which others are chosen as long as there are any."""
    min_run_steps: int = 16
    """Steps that a resumed request runs before it is chosen again, as long as there are others."""
    forecast_quantile: float = 0.8
    """predicted: the share of recent outputs that were no longer than what is promised."""
    forecast_safety: float = 1.2
    """predicted: factor on that quantile."""
    forecast_initial: int = 0
    """predicted: output tokens promised until enough requests have ended to tell; 0 promises `max_tokens`."""
    time_slice_steps: int = 64
    """Steps after which a request that waits for a slot takes that of the one that has run longest."""
    guest_budget: NumBytes = NumBytes(256 * 2**20)
    """Bytes of host memory of one worker for parked requests of the other decode workers."""
    host_budget: NumBytes = NumBytes(2**30)
    """Bytes of host memory of one worker for parked requests."""
    disk_directory: Path | None = None
    """Folder for parked requests that host memory cannot hold; unset uses none."""
    disk_budget: NumBytes = NumBytes(16 * 2**30)
    """Bytes of one worker's files there."""
    disk_fsync: bool = True
    """Whether an image is on stable storage before it counts as saved."""


class ExpertPolicy(enum.Enum):
    """Which experts deserve fast memory; `dsv4 experts simulate` compares them. STATIC never changes its mind."""

    LRU = "lru"
    LFU = "lfu"
    HEAT = "heat"
    LFRU = "lfru"
    STATIC = "static"


class ExpertSource(enum.Enum):
    """How absent experts are read. MMAP leaves caching to the kernel, RESIDENCY bounds it, DIRECT does without."""

    MMAP = "mmap"
    RESIDENCY = "residency"
    DIRECT = "direct"


@dataclass(frozen=True, slots=True)
class ExpertSettings:
    """Routed experts of every worker: how many sit in fast memory, and where the others come from. Any budget answers
    with the same tokens. Fast memory is the GPU's; on CPU workers, memory for experts in the kernels' layout."""

    hbm: NumBytes | None = None
    """Fast memory for experts of one worker, never exceeded; unset keeps all of them there."""
    slots: int | None = None
    """Experts in fast memory, instead of what `hbm` buys."""
    total_gpu: NumBytes | None = None
    """GPU memory of one whole worker; experts get what weights, KV and buffers leave of it. GPU workers only."""
    host: NumBytes | None = None
    """Host memory of one worker for absent experts: a bank filled at start, or, with `residency`, mapped pages. Unset:
    none on CPU workers; on GPU workers, which read absent experts there, room for all as far as the host has it."""
    policy: ExpertPolicy = ExpertPolicy.LFRU
    """lru, lfu, heat, lfru or static (which needs a trace in `preload`)."""
    source: ExpertSource = ExpertSource.MMAP
    """mmap, residency (needs `host`) or direct."""
    preload: Preload = Preload("none")
    """In fast memory before the first request: none, prefix (first experts of each layer), or a recorded trace's
    most used (a file of `dsv4 experts record`)."""
    packed: Path | None = None
    """File of `dsv4 experts repack`, read instead of the checkpoint's shards."""
    verify: bool = False
    """Check every read against the first one's checksum, and slots against what was read; for fault hunts."""
    verbose: bool = False
    """Log which experts come into slots and which leave for them, with what each is worth."""
    peer: bool = True
    """Whether two GPU workers on one node hold what the other lacks and read it from each other's memory."""

    @property
    def is_limited(self) -> bool:
        """Whether some experts may be absent from fast memory."""
        return self.hbm is not None or self.slots is not None or self.total_gpu is not None


@dataclass(frozen=True, slots=True)
class AdminSettings:
    """What operators may do to a running deployment beyond serving it; everything is off by default."""

    allow_retract_control: bool = False
    """Serve /admin/retract, which forces retracts, and damage for proofs, on live decode workers."""


@dataclass(frozen=True, slots=True)
class RaySettings:
    """How to find or start Ray."""

    address: str | None = None
    """Address of a running Ray cluster; unset starts a local one that ends with the command."""
    namespace: str = "dsv4"
    """Ray namespace of the named actors; two clusters on one Ray need two."""
    max_restarts: int = 3
    """Times that Ray restarts a worker that died before giving it up."""
    start_deadline: Seconds = Seconds(300.0)
    """Longest wait until every worker is ready."""
    worker_host: str = "127.0.0.1"
    """Address that workers listen on; `0.0.0.0` where several machines serve one deployment."""


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """One deployment. Raises `ConfigError` when values contradict each other."""

    model: Path = BUNDLED_MODEL
    """Checkpoint folder in the official layout, or `synthetic:PRESET[:layers=N][:seed=S]` for random weights."""
    model_name: str = ""
    """Name that clients use; empty takes the folder's."""
    device: Device = Device.AUTO
    """auto, cpu or cuda."""
    precision: PrecisionMode = PrecisionMode.NATIVE
    """native or fp32."""
    max_context: int | None = None
    """Most prompt and output tokens of one request; unset takes the model's own limit, but at most 16384."""
    effort: Effort = Effort.AUTO
    """Prompt convention of reasoning effort: auto, none (dsv4-nano), preview (April 2026), refresh (0731 and later)."""
    router: RouterSettings = field(default_factory=RouterSettings)
    prefill: PrefillSettings = field(default_factory=PrefillSettings)
    decode: DecodeSettings = field(default_factory=DecodeSettings)
    ray: RaySettings = field(default_factory=RaySettings)
    retract: RetractSettings = field(default_factory=RetractSettings)
    experts: ExpertSettings = field(default_factory=ExpertSettings)
    admin: AdminSettings = field(default_factory=AdminSettings)
    source: str = field(default="defaults", metadata={"internal": True})
    """Where the values came from, for error messages. Not a key."""

    def __post_init__(self) -> None:
        def check(ok: bool, key: str, problem: str) -> None:
            if not ok:
                raise ConfigError(self.source, key, problem)

        for role, settings in (("prefill", self.prefill), ("decode", self.decode)):
            check(settings.count >= 1, f"{role}.count", f"found {settings.count}, expected at least 1")
            check(settings.threads >= 1, f"{role}.threads", f"found {settings.threads}, expected at least 1")
            check(
                settings.max_running >= 1, f"{role}.max_running", f"found {settings.max_running}, expected at least 1"
            )
            check(settings.gpus is None or settings.gpus >= 0, f"{role}.gpus", f"found {settings.gpus}, expected >= 0")
            wanted = self.device is not Device.CPU or not settings.gpus
            check(wanted, f"{role}.gpus", f"found {settings.gpus} with device: cpu")
            has_gpu = self.device is not Device.CUDA or settings.gpus != 0
            check(has_gpu, f"{role}.gpus", "found 0 with device: cuda")
            check(
                settings.kv_budget >= 2**20, f"{role}.kv_budget", f"found {settings.kv_budget} bytes, expected >= 1MiB"
            )
        check(self.prefill.chunk_tokens >= 1, "prefill.chunk_tokens", "expected at least 1")
        check(self.max_context is None or self.max_context >= 2, "max_context", "expected at least 2")
        for key in ("full_pages", "window_pages", "slots"):
            units = getattr(self.decode, key)
            check(units is None or units >= 1, f"decode.{key}", f"found {units}, expected at least 1")
        budgets = ("guest_budget", "host_budget", "disk_budget")
        for key in ("horizon_steps", "max_retracts", "forecast_safety", "time_slice_steps"):
            value = getattr(self.retract, key)
            check(value >= 1, f"retract.{key}", f"found {value}, expected at least 1")
        for key in ("extra_requests", "min_run_steps", "forecast_initial", *budgets):
            value = getattr(self.retract, key)
            check(value >= 0, f"retract.{key}", f"found {value}, expected at least 0")
        quantile = self.retract.forecast_quantile
        check(0 < quantile <= 1, "retract.forecast_quantile", f"found {quantile}, expected more than 0, at most 1")
        check(self.decode.lease > 0, "decode.lease", "expected more than 0 s")
        check(self.decode.max_waiting >= 0, "decode.max_waiting", "expected at least 0")
        self._check_experts(check)
        check(self.router.request_deadline > 0, "router.request_deadline", "expected more than 0 s")
        check(self.router.max_concurrent >= 1, "router.max_concurrent", "expected at least 1")
        check(self.ray.max_restarts >= 0, "ray.max_restarts", "expected at least 0")
        ports = {
            "router.port": (self.router.port, 1),
            "prefill.port": (self.prefill.port, self.prefill.count),
            "decode.port": (self.decode.port, self.decode.count),
        }
        used: dict[int, str] = {}
        for key, (first, count) in ports.items():
            check(first >= 0 and first + count <= 65536, key, f"found {first}, expected a port")
            for port in range(first, first + count) if first else ():
                check(port not in used, key, f"port {port} is also taken by {used.get(port)}")
                used[port] = key

    def _check_experts(self, check: Callable[[bool, str, str], None]) -> None:
        experts = self.experts
        limited = experts.is_limited
        check(experts.hbm is None or experts.hbm >= 1, "experts.hbm", f"found {experts.hbm}, expected at least 1 byte")
        check(experts.slots is None or experts.slots >= 1, "experts.slots", f"found {experts.slots}, expected >= 1")
        total = experts.total_gpu
        check(total is None or total >= 1, "experts.total_gpu", f"found {total}, expected at least 1 byte")
        budgets = [key for key in ("hbm", "slots", "total_gpu") if getattr(experts, key) is not None]
        beside = f"found beside {budgets[0]}, expected one of them" if len(budgets) > 1 else ""
        check(not beside, f"experts.{budgets[-1] if budgets else ''}", beside)
        on_gpu = total is None or self.device is not Device.CPU
        check(on_gpu, "experts.total_gpu", "has no meaning with device: cpu; use hbm or slots")
        bounded = not limited or experts.source is not ExpertSource.RESIDENCY or bool(experts.host)
        check(bounded, "experts.host", "found 0, expected a size with source: residency")
        recorded = experts.preload not in ("none", "prefix")
        is_static = experts.policy is ExpertPolicy.STATIC
        check(recorded or not is_static, "experts.policy", "static needs a recorded trace in experts.preload")
        for key in ("host", "packed", "verify", "verbose"):
            check(limited or not getattr(experts, key), f"experts.{key}", "has no effect without a budget")

    @property
    def served_name(self) -> str:
        """The model name that clients use."""
        return self.model_name or self.model.name


def load_config(path: Path) -> ClusterConfig:
    """Read one YAML file. Raises `ConfigError` naming the key when anything in it is not understood."""
    import yaml

    try:
        document = yaml.safe_load(path.read_text())
    except OSError as exc:
        raise ConfigError(str(path), "", exc.strerror or str(exc)) from exc
    except (UnicodeDecodeError, yaml.YAMLError) as exc:
        raise ConfigError(str(path), "", f"not YAML: {exc}") from exc
    return config_from_mapping({} if document is None else document, source=str(path), base=path.resolve().parent)


def config_from_mapping(document: object, *, source: str, base: Path) -> ClusterConfig:
    """Build the config from parsed YAML; relative paths count from `base`."""
    values = _fields_from(ClusterConfig, document, "", source, base)
    return ClusterConfig(**values, source=source)


def parse_bytes(text: int | str) -> NumBytes:
    """`2GiB` -> 2147483648. Raises `ValueError` when the text is not a size."""
    return NumBytes(int(_quantity(text, _BYTE_UNITS, "a size such as 512MiB")))


def parse_seconds(text: float | str) -> Seconds:
    """`500ms` -> 0.5. Raises `ValueError` when the text is not a duration."""
    return Seconds(_quantity(text, _SECOND_UNITS, "a duration such as 30s"))


def _quantity(text: float | str, units: Mapping[str, float], expected: str) -> float:
    if isinstance(text, bool):
        raise ValueError(f"found {text!r}, expected {expected}")
    match = _QUANTITY.match(str(text))
    if match is None or match[2].upper() not in units:
        raise ValueError(f"found {text!r}, expected {expected}")
    return float(match[1]) * units[match[2].upper()]


def _fields_from(kind: type, document: object, prefix: str, source: str, base: Path) -> dict[str, Any]:
    """Keyword arguments of dataclass `kind`; nested dataclasses are built."""
    if not isinstance(document, Mapping):
        raise ConfigError(source, prefix.rstrip("."), f"found {document!r}, expected a mapping of settings")
    known = {item.name: item for item in dataclasses.fields(kind) if not item.metadata.get("internal")}
    hints = typing.get_type_hints(kind)
    values = {}
    for key, value in document.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.4)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known keys: {', '.join(known)}"
            raise ConfigError(source, f"{prefix}{key}", f"unknown key; {hint}")
        try:
            values[key] = _value_from(hints[key], value, f"{prefix}{key}", source, base)
        except ValueError as exc:
            raise ConfigError(source, f"{prefix}{key}", str(exc)) from exc
    return values


def _value_from(hint: Any, value: object, key: str, source: str, base: Path) -> Any:
    """One YAML value as the type that the field declares. Raises `ValueError` for a wrong type."""
    if dataclasses.is_dataclass(hint):
        assert isinstance(hint, type)
        return hint(**_fields_from(hint, value, f"{key}.", source, base))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        inner = next(option for option in typing.get_args(hint) if option is not types.NoneType)
        return None if value is None else _value_from(inner, value, key, source, base)
    if hint is Preload:
        if not isinstance(value, str) or not value:
            raise ValueError(f"found {value!r}, expected none, prefix or a file")
        return value if value in ("none", "prefix") else str((base / Path(value).expanduser()).resolve())
    if hint in (NumBytes, Seconds):
        if not isinstance(value, int | float | str):
            raise ValueError(f"found {value!r}, expected a number with a unit")
        return parse_bytes(typing.cast(int, value)) if hint is NumBytes else parse_seconds(value)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        choices = [member.value for member in hint]
        if value not in choices:
            raise ValueError(f"found {value!r}, expected one of {', '.join(choices)}")
        return hint(value)
    if hint is Path:
        if not isinstance(value, str):
            raise ValueError(f"found {value!r}, expected a path")
        return model_folder(value, base) if key == "model" else (base / Path(value).expanduser()).resolve()
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ValueError(f"found {value!r}, expected a list of strings")
        return tuple(value)
    return _plain_value(hint, value)


def _plain_value(hint: type, value: object) -> object:
    names = {int: "an integer", float: "a number", str: "text", bool: "true or false"}
    accepted = (int, float) if hint is float else (hint,)
    if not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"found {value!r}, expected {names[hint]}")
    return hint(value)
