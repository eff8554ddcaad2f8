"""Sections of a fine-tuning recipe that a probe has not: every key, its default, its limits. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from probes.sections import DataSection, ModelSection, RecipeError, RunSection, ScheduleSection, Section, setting


@dataclass
class HeadSection(Section):
    """Pooling, classifier and where the classifier starts from."""

    pool: str = setting("gap", choices=("cls", "gap"))
    """"gap": mean of the patch tokens, then a fresh `fc_norm` (published); "cls": final-norm class token."""
    kind: str = setting("linear", choices=("linear", "bn_linear"))
    """"linear" (published), or "bn_linear": BatchNorm1d without affine in front."""
    start: str = setting("fresh", choices=("fresh", "checkpoint", "probe", "zero_shot", "linear_probe"))
    """"fresh": normal, standard deviation 2e-5 (published); "checkpoint": the weight file's own head, which must have
    the data's classes; "probe": the head of the finished probe in `probe`; "zero_shot": the classes' texts;
    "linear_probe": a probe that is fitted first (LP-FT). The last three need pool "cls" and kind "linear"."""
    probe: str | None = None
    """Run folder of a probe on the class token, or its head.safetensors."""
    objective: str = setting("classes", choices=("classes", "contrastive"))
    """"classes": cross-entropy of the classifier (published); "contrastive": images against the prompts of their
    classes, with the text tower trained along (FLYP); needs start "zero_shot". Every image of the global batch is held
    against all its prompts: in micro-batches that takes one more forward pass."""
    prompt: str = "{}"
    """Text of a class for "zero_shot"; `{}` is its name, with `-` and `_` read as spaces."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start in ("probe", "zero_shot", "linear_probe") and (self.pool, self.kind) != ("cls", "linear"):
            raise RecipeError(
                f"start is {self.start!r} with pool {self.pool!r} and kind {self.kind!r}; such a head is a linear "
                "layer on the class token: set head.pool=cls and head.kind=linear"
            )
        if self.objective == "contrastive" and self.start != "zero_shot":
            raise RecipeError(
                f"objective is 'contrastive' with start {self.start!r}; its head is made of texts: set "
                "head.start=zero_shot, head.pool=cls and head.kind=linear"
            )
        if (self.probe is not None) != (self.start == "probe"):
            raise RecipeError(f"probe is {self.probe!r} with start {self.start!r}; give a probe with start=probe alone")


@dataclass
class EvaluateDataSection(DataSection):
    """The images of `finetune.evaluate`."""

    classes_of: str = setting("run", choices=("run", "test"))
    """What a run may answer where `test` has images of some of its classes only. "run": any of its classes, as in use,
    and an absent one is wrong; "test": the classes that occur, as published for ImageNet-A and -R, whose figures are
    over 200 of 1,000. The result names both. Without effect on images of several classes, where each class counts for
    itself."""


@dataclass
class TuneSection(Section):
    """What is trained."""

    what: str = setting("all", choices=("all", "last_blocks", "norm", "bias", "lora", "head"))
    """"all"; "last_blocks": the last `blocks` blocks and what follows; "norm": LayerNorms; "bias": biases and
    LayerNorms (BitFit); "lora": low-rank adapters; "head": the head alone. The head is always trained."""
    blocks: int = setting(4, low=1)
    """Blocks of "last_blocks"."""
    patch_embed: bool = False
    """Train the patch embedding; the published fine-tunes gave it no gradient."""
    lora_rank: int = setting(8, low=1)
    """Rank of "lora"."""
    lora_alpha: float = setting(16.0, low=0.0)
    """Scale of "lora": the update is multiplied by alpha / rank."""
    lora_targets: list[str] = setting(["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
    """Ends of the names of the layers that "lora" adapts."""


@dataclass
class AugmentSection(Section):
    """The training view and how views are mixed."""

    scale: float = setting(0.08, low=0.01, high=1.0)
    """Smallest area of the random resized crop, as a share of the image; the largest is 1."""
    flip: float = setting(0.5, low=0.0, high=1.0)
    """Probability of a horizontal flip."""
    policy: str | None = "rand-m9-mstd0.5-inc1"
    """timm's name of an automatic augmentation ("rand-…", "augmix-…", "3a" for 3-Augment); null for none."""
    color_jitter: float | None = setting(None, low=0.0)
    """Colour jitter, applied where no policy is (or the policy is "3a"), as in timm."""
    erasing: float = setting(0.0, low=0.0, high=1.0)
    """Probability of random erasing."""
    mixup: float = setting(0.0, low=0.0)
    """Alpha of mixup; 0 is none."""
    cutmix: float = setting(0.0, low=0.0)
    """Alpha of cutmix; 0 is none. With both, each batch takes one of them at random."""
    repeats: int = setting(1, low=1)
    """Views of one image in an epoch (repeated augmentation); an epoch then covers 1 / repeats of the images."""


@dataclass
class RegularisationSection(Section):
    """What keeps the weights from fitting too well."""

    drop_path: float = setting(0.4, low=0.0, high=0.99)
    """Stochastic depth of the last block; it grows linearly from 0 at the first."""
    skip_dropped: bool = True
    """Leave the work of dropped samples out instead of multiplying it by zero; the same in expectation."""
    label_smoothing: float = setting(0.3, low=0.0, high=0.99)
    """Share of the target that is spread over all classes; with several labels an image, over yes and no."""
    class_weights: str = setting("none", choices=("none", "auto"))
    """"auto" weighs the loss of a class by the inverse of its share of train; with several labels an image, that of
    its positives by how many negatives there are for one. The mean is over the images of a step."""


@dataclass
class OptimizerSection(Section):
    """The optimizer."""

    name: str = setting("adamw", choices=("adamw", "adamw_8bit", "sgd"))
    """AdamW (published), the same with both moments of matrices in 8 bit (bitsandbytes; 2 bytes a parameter instead of
    8), or SGD."""
    lr: float = setting(3e-5, low=0.0)
    """Peak learning rate of the last layers, absolute: never rescaled by the batch."""
    weight_decay: float = setting(0.05, low=0.0)
    """Weight decay of matrices; 1-D tensors, `cls_token` and `pos_embed` have none."""
    layer_decay: float = setting(0.9, low=1e-6, high=1.0)
    """Factor of the learning rate from a layer to the one before it."""
    beta1: float = setting(0.9, low=0.0, high=1.0)
    """First moment's decay; momentum of SGD."""
    beta2: float = setting(0.999, low=0.0, high=1.0)
    """Second moment's decay."""
    eps: float = setting(1e-8, low=0.0)
    """Added to the root of the second moment."""
    clip_grad: float | None = setting(None, low=0.0)
    """Largest norm of the gradient; null does not clip (published)."""


@dataclass
class EmaSection(Section):
    """Moving average of the weights, in fp32, scored beside the raw ones."""

    decay: float | None = setting(0.9999, low=0.0, high=0.999999)
    """Share that is kept at each step; null for no average."""


@dataclass
class TrainerSection(Section):
    """How the work is laid out on devices."""

    global_batch: int = setting(512, low=1)
    """Images of one optimizer step over all devices; accumulation is derived from it."""
    micro_batch: int | None = setting(None, low=1)
    """Images of one forward pass on one device; null lets the planner choose the largest that fits."""
    devices: int = setting(1, low=1)
    """Number of devices (processes) on each node."""
    nodes: int = setting(1, low=1)
    """Number of machines."""
    precision: str = setting("auto", choices=("auto", "fp32", "bf16", "fp16"))
    """Precision of the forward and backward pass; weights, optimizer, norms, head and loss are fp32. "auto": bf16 where
    the device multiplies it natively (GPUs of compute capability 8, processors with AVX512-BF16 or AMX), else fp32."""
    strategy: str = setting("auto", choices=("auto", "ddp", "fsdp2"))
    """"auto" is "ddp" with several devices; "fsdp2" spreads weights, gradients, moments and average over them."""
    timeout_s: float = setting(1800.0, low=1.0)
    """Seconds after which a process gives up waiting for the others (one of them has died)."""
    compile: bool = False
    """Compile each block with torch.compile; the first steps take minutes longer, and a CPU needs a C++ compiler."""
    checkpointing: bool | None = None
    """Recompute activations in the backward pass; null lets the planner decide."""
    non_finite: str = setting("stop", choices=("stop", "skip"))
    """On a loss or gradient that is not finite, stop, or skip the step; the batch's images are listed either way."""


@dataclass
class CheckpointSection(Section):
    """What is kept while training."""

    every_steps: int = setting(1000, low=1)
    """Optimizer steps between checkpoints inside an epoch; there is one at the end of every epoch besides."""
    keep: int = setting(2, low=2)
    """Newest checkpoints kept; an older one is taken where the newest cannot be read."""


@dataclass
class ExpectedSection(Section):
    """Scores in percent that the recipe should reach; a run ends with measured beside expected."""

    last_raw_top1: float | None = setting(None, low=0.0, high=100.0)
    """Top-1 on test of the raw weights after the last epoch."""
    best_raw_top1: float | None = setting(None, low=0.0, high=100.0)
    """Highest top-1 on test of the raw weights over all epochs (an oracle: test chose it)."""
    last_ema_top1: float | None = setting(None, low=0.0, high=100.0)
    """Top-1 on test of the averaged weights after the last epoch."""
    best_ema_top1: float | None = setting(None, low=0.0, high=100.0)
    """Highest top-1 on test of the averaged weights over all epochs (an oracle)."""
    selected_top1: float | None = setting(None, low=0.0, high=100.0)
    """Top-1 on test of the weights that the hold-out or `val` chose."""
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
class FinetuneRecipe:
    """All of a fine-tune. Section by section in the order of the file."""

    run: RunSection = field(default_factory=RunSection)
    model: ModelSection = field(default_factory=ModelSection)
    head: HeadSection = field(default_factory=HeadSection)
    tune: TuneSection = field(default_factory=TuneSection)
    data: DataSection = field(default_factory=DataSection)
    augment: AugmentSection = field(default_factory=AugmentSection)
    regularisation: RegularisationSection = field(default_factory=RegularisationSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    schedule: ScheduleSection = field(default_factory=ScheduleSection)
    ema: EmaSection = field(default_factory=EmaSection)
    trainer: TrainerSection = field(default_factory=TrainerSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    expected: ExpectedSection = field(default_factory=ExpectedSection)
