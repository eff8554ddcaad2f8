"""The sections of a recipe: every key, its default, its limits and what it means. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from eva_clip.feature_kinds import check_kinds, pool_kinds
from probes.bank_sections import BankSection, check_bank
from probes.section_base import DataAbsent as DataAbsent
from probes.section_base import RecipeError as RecipeError
from probes.section_base import Section as Section
from probes.section_base import setting as setting


@dataclass
class RunSection(Section):
    """Where a run writes and what its randomness starts from."""

    dir: str | None = None
    """Run folder; null makes a fresh one under `logs/`, named after the recipe and the time."""
    seed: int = setting(0, low=0)
    """Seed of sampling order, augmentation and initial weights; the hold-out has its own, `data.holdout_seed`."""
    seeds: list[int] = setting([])
    """Frozen features only: repeat with these seeds instead, from one extraction, each with a hold-out drawn from its
    own seed. The first is reported in full, with mean and spread over all. Without a test split each is scored on its
    own hold-out."""
    on_existing: str = setting("error", choices=("error", "resume", "overwrite"))
    """What to do when the run folder already holds a run."""


@dataclass
class ModelSection(Section):
    """The encoder."""

    name: str = "EVA01-CLIP-g-14"
    """Official name or alias of a model (`eva_clip.list_models()`)."""
    weights: str = "pretrained"
    """"pretrained", "random", or a checkpoint file."""
    image_size: int | None = setting(None, low=1)
    """Input side in pixels; null takes the model's own. Position embeddings are resized to it once."""
    pos_embed: str = setting("eva", choices=("eva", "timm"))
    """How position embeddings are resized: bicubic without ("eva", published) or with ("timm") antialias."""
    config: str | None = None
    """JSON file of a further model, registered before `name` is looked up."""


@dataclass
class StoredFeaturesSection(Section):
    """What the head sees."""

    pool: str = "cls"
    """Class token ("cls"), mean of the patch tokens ("gap"), or both ("cls+gap"); class tokens of the last n blocks
    ("cls_last4"), also with the mean ("cls_last4+gap"). All after the final norm."""
    projected: bool = False
    """Apply the projection into the image-text space (pool "cls" only)."""
    l2norm: bool = False
    """Scale features to unit length."""
    kinds: list[str] = setting([])
    """Further features that the pass which extracts also stores: "cls", "gap", "projected", "cls_last<n>"."""
    cache: str = "logs/features"
    """Folder of cached features, shared by all runs; entries are named by a hash of all that determines them
    (`python -m probes.features ls`)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.projected and self.pool != "cls":
            raise RecipeError(f"projected is true with pool {self.pool!r}; only pool 'cls' has a projection")
        problems = []
        try:
            pool_kinds(self.pool)
        except ValueError as error:
            problems.append(f"pool: {error}")
        try:
            check_kinds(self.kinds)
        except ValueError as error:
            problems.append(f"kinds: {error}")
        if problems:
            raise RecipeError("\n".join(problems))


@dataclass
class FeaturesSection(StoredFeaturesSection):
    """What the head sees, and when the encoder runs."""

    mode: str = setting("online", choices=("online", "cached"))
    """"online" runs the encoder on a fresh augmented view at every step; "cached" once, on the evaluation view or on
    `views` augmented ones."""
    views: int = setting(0, low=0)
    """Augmented copies of train in the store (mode "cached"): epoch e trains on copy e mod `views`. 0 trains on the
    evaluation view."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.views and self.mode != "cached":
            raise RecipeError(f"views is {self.views} with mode {self.mode!r}; only mode 'cached' stores views")


@dataclass
class DataSection(Section):
    """The images. Relative paths are read from the current folder."""

    format: str = setting("folder", choices=("folder", "csv", "tar", "hf", "clip_benchmark", "torchvision"))
    """"folder": one sub-folder per class; "csv": columns path,label[,split]; "tar": WebDataset shards;
    "clip_benchmark" and "torchvision": sets of those libraries. `train`, `val` and `test` are then a set's name there,
    such as `cifar10` or `CIFAR10`, and may name another of its splits than their own: `ImageNet:val`."""
    image_column: str | None = None
    """Format "hf" (a folder of `save_to_disk`, parquet files, or a name on Hugging Face's hub): column of images."""
    label_column: str | None = None
    """Format "hf": column of the class, or of a list of classes. Null finds it, as it does `image_column`."""
    media: str = setting("image", choices=("image", "video"))
    """"video": every file is a video, and its one centre frame is the image."""
    root: str = "data"
    """Folder of the libraries' sets: the files of a set lie in `root/<its name>`, so that no two sets share names."""
    download: bool = False
    """Let the library download a set that is not there."""
    train: str | None = None
    """Training images; a comma-separated list of paths is read as one."""
    val: str | None = None
    """Images that selection may look at; without them a hold-out from train takes their place."""
    test: str | None = None
    """Images of the reported score; never used for selection."""
    holdout: float = setting(0.0, low=0.0, high=0.9)
    """Share of train held out for selection, stratified by class and seeded; unused when `val` is given."""
    holdout_seed: int = setting(0, low=0)
    """Seed of the hold-out alone: runs of any `run.seed` hold the same images out, so that what they trained can be
    compared and averaged on them. Only `run.seeds` and `few_shot.shots` draw one from each of their seeds."""
    workers: int = setting(4, low=0)
    """Processes that decode images (0: in the main process)."""
    labels: str = setting("single", choices=("single", "multi"))
    """"single": each image has one class; "multi": any number, also none. A CSV's label column then holds them with `|`
    between (`cat|dog`, or nothing), and a library's set may have multi-hot vectors."""
    on_corrupt: str = setting("fail", choices=("fail", "skip"))
    """An unreadable image stops the run, or is left out, counted and listed."""
    train_size: int | None = setting(None, low=1)
    """Expected number of training images. `--plan` uses it where the data are absent; a run that finds another
    number says so and follows what it found."""
    num_classes: int | None = setting(None, low=1)
    """Expected number of classes, used like `train_size`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.labels == "multi" and self.format in ("folder", "tar"):
            raise RecipeError(
                f"labels is 'multi' with format {self.format!r}, which gives an image one class; list the images in a "
                "CSV (format csv), or use a library's set"
            )


@dataclass
class HeadSection(Section):
    """The classifier on the features."""

    kind: str = setting("bn_linear", choices=("bn_linear", "linear"))
    """"bn_linear": BatchNorm1d without affine, then Linear (published); "linear": Linear alone."""
    start: str = setting("random", choices=("random", "zero_shot"))
    """Weights that training starts from: drawn (published), or the classes' texts through the text tower, times the
    logit scale. Those are zero-shot's own logits on features that are projected and of unit length."""
    prompt: str = "{}"
    """Text of a class for "zero_shot"; `{}` is its name, with `-` and `_` read as spaces."""
    class_weights: str = setting("none", choices=("none", "auto"))
    """"auto" weighs the loss of a class by the inverse of its share of train. The mean is over the images of a step."""


@dataclass
class OptimizerSection(Section):
    """The optimizer of the head."""

    name: str = setting("lars", choices=("lars", "sgd", "adamw"))
    """LARS (published), SGD or AdamW."""
    lr: float = setting(1.0, low=0.0)
    """Peak learning rate, absolute: never rescaled by the batch."""
    weight_decay: float = setting(0.0, low=0.0)
    """Weight decay of matrices; biases have none."""
    momentum: float = setting(0.9, low=0.0, high=1.0)
    """Momentum of LARS and SGD; beta1 of AdamW."""


@dataclass
class ScheduleSection(Section):
    """Linear warm-up, then a half cosine, stepped per iteration."""

    epochs: int = setting(90, low=1)
    """Passes over the training images."""
    warmup_epochs: float = setting(10, low=0)
    """Epochs of linear warm-up from 0 to the peak."""
    final_lr: float = setting(0.0, low=0.0)
    """Learning rate that the cosine ends at."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup_epochs > self.epochs:
            raise RecipeError(f"warmup_epochs is {self.warmup_epochs}; expected at most epochs ({self.epochs})")


@dataclass
class TrainerSection(Section):
    """How the work is laid out on devices."""

    global_batch: int = setting(16000, low=1)
    """Images of one optimizer step over all devices; accumulation is derived from it."""
    micro_batch: int = setting(400, low=1)
    """Images of one forward pass on one device, and of one group of BatchNorm statistics (published: 400)."""
    devices: int = setting(1, low=1)
    """Number of devices (processes)."""
    precision: str = setting("auto", choices=("auto", "fp32", "bf16", "fp16"))
    """Precision of the encoder; loss, BatchNorm statistics and the head are fp32. "auto": bf16 where the device
    multiplies it natively (GPUs of compute capability 8, processors with AVX512-BF16 or AMX), else fp32."""
    sync_batch_norm: bool = False
    """BatchNorm statistics over all devices' micro-batches (GPUs only); else each device has its own (published)."""
    strategy: str = "auto"
    """Lightning strategy ("auto", "ddp", ...)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.global_batch % (self.micro_batch * self.devices):
            raise RecipeError(
                f"global_batch {self.global_batch} is not a multiple of micro_batch {self.micro_batch} x devices "
                f"{self.devices}; change one of the three"
            )

    @property
    def accumulate(self) -> int:
        """Forward passes of one device per optimizer step."""
        return self.global_batch // (self.micro_batch * self.devices)


@dataclass
class BaselinesSection(Section):
    """What the result is reported beside."""

    random_encoder: bool = False
    """The same probe on a randomly initialised copy of the encoder."""
    raw_pixels: bool = False
    """Logistic regression on raw pixels (32 x 32 RGB)."""
    zero_shot: bool = False
    """Class names through the model's text tower, without training."""
    prompt: str = "{}"
    """Text of a class for `zero_shot`; `{}` is its name, with `-` and `_` read as spaces."""


@dataclass
class ExpectedSection(Section):
    """Scores in percent that the recipe should reach; a run ends with measured beside expected."""

    last_top1: float | None = setting(None, low=0.0, high=100.0)
    """Top-1 on test after the last epoch."""
    best_top1: float | None = setting(None, low=0.0, high=100.0)
    """Highest top-1 on test over all epochs (an oracle: test chose it)."""
    selected_top1: float | None = setting(None, low=0.0, high=100.0)
    """Top-1 on test of the epoch that the hold-out or `val` chose."""
    tolerance: float = setting(0.2, low=0.0)
    """Points below which a difference counts as reached."""
    source: str | None = None
    """Where the figures come from."""
    reference_log: str | None = None
    """Published log as a CSV like those of `logs/reference`;
    every epoch is compared with it, and the report draws both."""
    reference_tolerance: float = setting(0.5, low=0.0)
    """Points of accuracy within which an epoch is on the published track."""


@dataclass
class Recipe:
    """All of a run. Section by section in the order of the file."""

    run: RunSection = field(default_factory=RunSection)
    model: ModelSection = field(default_factory=ModelSection)
    features: FeaturesSection = field(default_factory=FeaturesSection)
    data: DataSection = field(default_factory=DataSection)
    head: HeadSection = field(default_factory=HeadSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    schedule: ScheduleSection = field(default_factory=ScheduleSection)
    trainer: TrainerSection = field(default_factory=TrainerSection)
    bank: BankSection = field(default_factory=BankSection)
    baselines: BaselinesSection = field(default_factory=BaselinesSection)
    expected: ExpectedSection = field(default_factory=ExpectedSection)

    def __post_init__(self) -> None:
        features, head = self.features, self.head
        problems = []
        if head.start == "zero_shot" and not (features.projected and features.l2norm and head.kind == "linear"):
            problems.append(
                "head.start is 'zero_shot', whose weights fit projected features of unit length alone; set "
                "features.projected=true, features.l2norm=true and head.kind=linear"
            )
        if self.run.seeds and features.mode != "cached":
            problems.append("run.seeds repeats the training on stored features; set features.mode=cached")
        problems += check_bank(self)
        if problems:
            raise RecipeError("\n".join(problems))
