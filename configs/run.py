"""A run, as data: frozen dataclasses whose fields explain themselves, and no logic beyond refusing nonsense."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Literal

from configs.alignment import DistillConfig, PreferenceConfig, RLConfig, check_distillation
from configs.checks import check_range
from errors import UserError
from model.config import ModelConfig
from model.lora_config import LoraConfig
from sharding.mesh import MeshConfig

PREFERENCES = ("dpo", "reward", "kto")
"""Objectives that learn from what people prefer."""
BFLOAT16_STEP = 2.0**-8
"""Half the distance between numbers of bfloat16, as a share of them: less is lost in rounding to the nearest."""


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes batches."""

    sources: tuple[str, ...] = ()
    """Files, globs or prepared directories; .txt, .jsonl(.gz|.zst), .parquet, .arrayrecord."""
    weights: tuple[float, ...] = ()
    """Share of each source in the mixture; empty mixes in proportion to size."""
    validation: tuple[str, ...] = ()
    """Held-out sources; empty holds out `validation_fraction` of the documents of `sources`."""
    reference: tuple[str, ...] = ()
    """Further held-out sources whose loss is reported beside, such as a language that the model knew before."""
    validation_fraction: float = 0.01
    """Share of documents held out when `validation` is empty; 0 for none."""
    tokenizer: str = ""
    """Directory with tokenizer.model or tokenizer.json."""
    sequence_length: int = 256
    """Tokens in a packed row (T)."""
    batch_size: int = 8
    """Rows in a step, over all hosts and micro-batches (B)."""
    workers: int = 0
    """Processes that read ahead; 0 reads in a thread."""
    max_bad_rows: int = 100
    """Malformed rows that are skipped (each is reported) before the input is refused."""
    too_long: Literal["cut", "cut_left", "drop", "refuse"] = "cut"
    """What happens to a conversation longer than a row: keep its beginning, keep its end, leave it out, or stop."""
    train_on: Literal["assistant", "last"] = "assistant"
    """sft: every turn of the assistant, or the last one alone."""
    cache: str = ""
    """Where tokenised sources are kept; empty means a `data` directory in the run."""

    def __post_init__(self) -> None:
        if self.weights and len(self.weights) != len(self.sources):
            raise UserError(
                f"data.weights has {len(self.weights)} numbers for {len(self.sources)} data.sources; give one each"
            )
        if any(w < 0 for w in self.weights) or (self.weights and not sum(self.weights) > 0):
            raise UserError("data.weights must not be negative and must not all be zero")
        check_range(self, "data.", 1, "sequence_length", "batch_size")
        check_range(self, "data.", 0, "workers", "max_bad_rows")
        if not 0 <= self.validation_fraction < 1:
            raise UserError(f"data.validation_fraction={self.validation_fraction} must lie in [0, 1)")


@dataclass(frozen=True)
class OptimizerConfig:
    """How gradients change weights."""

    name: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon for matrices with adamw for everything else."""
    learning_rate: float = 3e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """Shape after warm-up: cosine to the end, warm-up-stable-decay, or flat."""
    warmup_steps: int = 20
    """Steps over which the learning rate rises linearly from 0."""
    decay_fraction: float = 0.2
    """wsd: last share of the steps over which the learning rate falls."""
    final_fraction: float = 0.1
    """Learning rate at the end, as a share of the peak."""
    beta1: float = 0.9
    """AdamW: decay of the mean of gradients."""
    beta2: float = 0.95
    """AdamW: decay of the mean of squared gradients."""
    eps: float = 1e-8
    """AdamW: added to the denominator."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; norms and biases are left alone."""
    clip_norm: float = 1.0
    """Gradients with a larger global norm are scaled down to it; 0 for never."""
    muon_learning_rate: float = 0.01
    """muon: peak learning rate of matrices."""
    muon_momentum: float = 0.95
    """muon: decay of the momentum."""
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """How the running means of gradients and of their squares are stored; they are computed in float32."""
    shard_over_data: bool = True
    """Cut weights and moments over mesh.data too between steps (ZeRO-1); false keeps a copy in each part."""

    def __post_init__(self) -> None:
        check_range(self, "optimizer.", 0, "warmup_steps", "eps", "weight_decay", "clip_norm")
        for name in ("learning_rate", "muon_learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"optimizer.{name}={getattr(self, name)} must be positive and finite")
        for name in ("beta1", "beta2", "muon_momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optimizer.{name}={getattr(self, name)} must lie in [0, 1)")
        for name in ("decay_fraction", "final_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"optimizer.{name}={getattr(self, name)} must lie in [0, 1]")
        decays = ("beta1", "beta2", "muon_momentum") if self.name == "muon" else ("beta1", "beta2")
        for name in decays if self.moment_dtype == "bfloat16" else ():
            if 1 - getattr(self, name) < BFLOAT16_STEP:
                raise UserError(
                    f"optimizer.{name}={getattr(self, name)} lets a mean fall by less than bfloat16 can tell, so it "
                    f"would never fall: at most {1 - BFLOAT16_STEP:.3f} goes with optimizer.moment_dtype=bfloat16"
                )


@dataclass(frozen=True)
class LossConfig:
    """What is added to the next-token loss."""

    z_loss: float = 0.0
    """Weight of the squared log-partition of the output."""
    balance: float = 0.001
    """Weight of the load-balance loss over the global batch (arXiv 2501.11873)."""
    router_z_loss: float = 0.0001
    """Weight of the squared log-partition of the router."""
    mtp: float = 0.1
    """Weight of the loss of the token after the next, where model.mtp_layers has a block for it."""
    bias_update_rate: float = 0.0
    """Step of the selection bias towards even load; needs model.moe.selection_bias."""
    neftune: float = 0.0
    """sft: noise on embeddings, at most this over sqrt(tokens x width) (NEFTune, 2310.05914); 5 is usual, 0 is none."""

    def __post_init__(self) -> None:
        check_range(self, "loss.", 0, "neftune")


@dataclass(frozen=True)
class CheckpointConfig:
    """When state is saved and what is kept."""

    every: int = 100
    """Steps between saves; a save also happens at the end and on SIGTERM or Ctrl-C."""
    keep: int = 2
    """Newest checkpoints kept; the one with the best validation loss is kept beside them."""

    def __post_init__(self) -> None:
        check_range(self, "checkpoint.", 1, "every", "keep")


@dataclass(frozen=True)
class Run:
    """Everything that decides what a training run does."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The architecture."""
    data: DataConfig = field(default_factory=DataConfig)
    """Text and batches."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer and schedule."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Auxiliary losses."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters that are trained in the place of all weights."""
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    """Learning from preferences."""
    rl: RLConfig = field(default_factory=RLConfig)
    """Reinforcement learning."""
    distill: DistillConfig = field(default_factory=DistillConfig)
    """Learning from a teacher."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """Devices along each axis."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Saving."""
    objective: Literal["pretrain", "sft", "dpo", "reward", "kto", "rl", "distill"] = "pretrain"
    """pretrain: text; sft: assistant's turns; dpo, reward: pairs; kto: judgements; rl: tasks; distill: a teacher."""
    init_from: str = ""
    """A MODEL whose weights to start from: a run, a Hugging Face directory, a .gguf or a llama2.c file."""
    init_model: Literal["config", "source"] = "config"
    """Who gives the model's sizes: this config, or `init_from` (and `model` is left out)."""
    init_how: Literal["same", "upcycle"] = "same"
    """same: weights as they are; upcycle: a mixture of experts (`model.moe`) cut from the layers of a dense model."""
    upcycle_fresh: float = 0.5
    """Share of the channels of each upcycled expert that starts at random."""
    steps: int = 100
    """Optimizer steps."""
    seed: int = 0
    """Decides the initial weights and the order of data."""
    accumulate: int = 1
    """Micro-batches that a step is cut into."""
    accumulate_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which the gradients of micro-batches are summed."""
    parameter_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of stored matrices, which bfloat16 is rounded to at random; norms, biases and routers stay float32."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of activations; auto is float32 on a CPU and bfloat16 elsewhere."""
    matmul: Literal["plain", "int8", "fp8"] = "plain"
    """Products with weights while training: as `dtype` says, or in 8 bits with a scale per token and channel."""
    remat: Literal["none", "block", "dots"] = "none"
    """Recompute in the backward pass: nothing, whole blocks, or all but matrix products."""
    layers: Literal["auto", "list", "stacked"] = "auto"
    """One array per layer, or stacked and scanned; auto is a list on a CPU and for few layers."""
    log_every: int = 1
    """Steps between lines of metrics.jsonl."""
    validate_every: int = 50
    """Steps between validation losses; 0 for only at the end."""
    validation_batches: int = 8
    """Batches in a validation loss."""
    samples: int = 0
    """Held-out prompts that are answered, greedily, at each validation; samples.jsonl has the replies."""
    sample_tokens: int = 64
    """Longest of these replies."""
    max_bad_steps: int = 20
    """Steps in a row that may be skipped for a loss or gradient that is not finite, before the run stops."""
    spike_factor: float = 0.0
    """Skip a step whose gradient norm exceeds this many times its running mean; 0 never skips."""
    out: str = ""
    """Run directory; empty means runs/ and the name of the config."""

    @property
    def optimizer_steps(self) -> int:
        """Updates of the weights in all steps."""
        return self.steps * (self.rl.updates if self.draws else 1)

    @property
    def draws(self) -> bool:
        """Whether the run learns from replies that the model draws itself to prompts of tasks."""
        return self.objective == "rl" or (self.objective == "distill" and self.distill.on_policy)

    def __post_init__(self) -> None:
        check_range(self, "", 1, "steps", "accumulate", "log_every", "max_bad_steps", "sample_tokens")
        check_range(self, "", 0, "validate_every", "validation_batches", "samples", "spike_factor", "seed")
        if self.data.batch_size % self.accumulate:
            raise UserError(f"data.batch_size={self.data.batch_size} does not divide by accumulate={self.accumulate}")
        if self.accumulate_dtype == "bfloat16" and self.accumulate * BFLOAT16_STEP >= 1:
            raise UserError(
                f"accumulate={self.accumulate} with accumulate_dtype=bfloat16 loses the last micro-batches, which are "
                f"less than the sum can tell; less than {1 / BFLOAT16_STEP:.0f} go, or accumulate_dtype=float32"
            )
        rows = self.data.batch_size // self.accumulate
        if rows % self.mesh.batch_shards:
            raise UserError(
                f"{rows} rows of a micro-batch do not divide over data x fsdp x expert = {self.mesh.batch_shards}"
            )
        check_rows(self)
        if self.lora.base != "same" and self.matmul != "plain":
            raise UserError(
                f"lora.base={self.lora.base} keeps the weights of products in 8 bits, which matmul={self.matmul} would "
                "round again; leave one of them at its default"
            )
        check_start(self)
        check_objective(self)
        # Sizes that init_from gives are not known yet; they are judged when they take the place of `model`.
        if self.init_model == "config":
            check_model(self)


def check_objective(run: Run) -> None:
    """Refuses fields about what is learnt that do not fit together."""
    if run.loss.neftune and run.objective != "sft":
        raise UserError(f"loss.neftune={run.loss.neftune} goes with objective=sft, not {run.objective}")
    if run.samples and run.objective in ("reward", "rl"):
        other = "gives numbers, not text" if run.objective == "reward" else "writes its own: rl.validation_problems"
        raise UserError(f"samples={run.samples} asks for replies while training, and objective={run.objective} {other}")
    if run.objective == "distill":
        check_distillation(run.distill, run.rl)
    if run.objective == "rl":
        if not run.rl.tasks:
            raise UserError("objective=rl learns from tasks; name some with rl.tasks, such as arithmetic?digits=1")
        if run.rl.samples < 2:
            raise UserError(f"rl.samples={run.rl.samples} leaves a reply nothing to be compared with; take 2 or more")
        if run.rl.replay and not (run.model.moe.num_experts or run.init_model == "source"):
            raise UserError("rl.replay sends tokens to the experts that they went to, and this model has none")
    if run.draws and run.data.sequence_length <= run.rl.max_new_tokens:
        raise UserError(
            f"data.sequence_length={run.data.sequence_length} leaves no room for a prompt before "
            f"rl.max_new_tokens={run.rl.max_new_tokens}"
        )


def check_rows(run: Run) -> None:
    """Refuses fields about rows that the objective has no use for."""
    if run.data.too_long != "cut" and run.objective == "pretrain":
        raise UserError(
            f"data.too_long={run.data.too_long} is about conversations; objective=pretrain goes on in the next row "
            "where a document is longer than one"
        )
    if run.data.train_on != "assistant" and run.objective not in ("sft", "distill"):
        raise UserError(f"data.train_on={run.data.train_on} goes with objective=sft or distill, not {run.objective}")


def check_start(run: Run) -> None:
    """Refuses fields about the first weights that do not fit together."""
    if not 0 <= run.upcycle_fresh <= 1:
        raise UserError(f"upcycle_fresh={run.upcycle_fresh} must lie in [0, 1]")
    for name, default in (("init_model", "config"), ("init_how", "same")):
        if getattr(run, name) != default and not run.init_from:
            raise UserError(f"{name}={getattr(run, name)} needs init_from; name a model to start from")
    if run.init_how == "upcycle":
        if run.lora.rank:
            raise UserError("init_how=upcycle makes experts and routers that have to be trained; set lora.rank 0")
        if not run.model.moe.num_experts:
            raise UserError("init_how=upcycle makes a mixture of experts; set model.moe.num_experts and its sizes")
        if run.model.moe.activation != "swiglu" or run.model.moe.bias:
            raise UserError("init_how=upcycle copies experts that dense layers are like: swiglu, without biases")
    if run.init_model == "source":
        for own in fields(run.model):
            allowed = own.name == "num_labels" or (run.init_how == "upcycle" and own.name == "moe")
            if not allowed and getattr(run.model, own.name) != getattr(ModelConfig(), own.name):
                raise UserError(
                    f"init_model=source takes the sizes of {run.init_from}, and the config sets model.{own.name} too; "
                    "leave it out, or set init_model=config"
                )


def check_model(run: Run) -> None:
    """Refuses sizes of the model that do not go with the rest of the run."""
    if run.data.sequence_length > run.model.max_positions:
        raise UserError(
            f"data.sequence_length={run.data.sequence_length} is longer than "
            f"model.max_positions={run.model.max_positions}"
        )
    check_divides(run.model, run.mesh)
    if run.data.sequence_length % run.mesh.context:
        raise UserError(
            f"data.sequence_length={run.data.sequence_length} does not divide over mesh.context={run.mesh.context}"
        )
    own, taps = run.data.sequence_length // run.mesh.context, run.model.linear.conv_kernel
    if run.mesh.context > 1 and "linear" in run.model.attention_pattern and own < taps - 1:
        raise UserError(
            f"data.sequence_length={run.data.sequence_length} over mesh.context={run.mesh.context} leaves {own} tokens "
            f"to a device, and the convolutions of linear layers look back over {taps - 1}"
        )
    if run.loss.bias_update_rate and not run.model.moe.selection_bias:
        raise UserError("loss.bias_update_rate needs model.moe.selection_bias true")


def check_divides(model: ModelConfig, mesh: MeshConfig) -> None:
    """Refuses sizes of `model` that do not divide over the axes of `mesh`."""
    parts = [("heads", model.num_heads, "tensor"), ("key/value heads", model.num_kv_heads, "tensor")]
    if model.moe.num_experts:
        parts.append(("experts", model.moe.num_experts, "expert"))
        parts.append(("channels of an expert", model.moe.intermediate_size, "tensor"))
    if model.num_moe_layers < model.num_layers:
        parts.append(("feed-forward channels", model.intermediate_size, "tensor"))
    for what, size, axis in parts:
        shards = getattr(mesh, axis)
        if size % shards:
            raise UserError(f"{size} {what} do not divide over mesh.{axis}={shards}")
    cut = ["fsdp", "expert", "context", *(["data"] if mesh.cut_over_data else [])]
    if model.hidden_size % math.prod(mesh.sizes[axis] for axis in cut):
        shards = " x ".join(f"mesh.{axis}={mesh.sizes[axis]}" for axis in cut)
        raise UserError(f"{model.hidden_size} channels of the residual stream do not divide over {shards}")
