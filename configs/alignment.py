"""How a run learns from preferences, from rewards and from a teacher: parts of `configs.run.Run`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from configs.checks import check_range
from errors import UserError


@dataclass(frozen=True)
class PreferenceConfig:
    """Losses over replies that people prefer, or do not: dpo, kto and reward."""

    loss: Literal["sigmoid", "ipo", "simpo"] = "sigmoid"
    """dpo: its own loss (arXiv 2305.18290), that of IPO (2310.12036) or that of SimPO (2405.14734, no reference)."""
    beta: float = 0.1
    """How much a difference of log-probabilities counts; the smaller, the farther from the reference."""
    margin: float = 0.0
    """simpo: what the chosen reply has to be better by."""
    label_smoothing: float = 0.0
    """dpo: share of pairs that are taken to be the wrong way round (cDPO)."""
    sft: float = 0.0
    """dpo: weight of the mean negative log-probability of the chosen reply's tokens (RPO, arXiv 2404.19733)."""
    good: float = 1.0
    """kto: weight of good replies (arXiv 2402.01306)."""
    bad: float = 1.0
    """kto: weight of bad replies."""
    reference: Literal["cached", "live"] = "cached"
    """Log-probabilities of the reference: all before training, kept on disk; or those of each batch when it comes."""
    reference_model: str = ""
    """The MODEL that is the reference; empty for the one that the run starts from."""

    def __post_init__(self) -> None:
        check_range(self, "preference.", 0, "margin", "sft", "good", "bad")
        if not self.beta > 0:
            raise UserError(f"preference.beta={self.beta} must be positive")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"preference.label_smoothing={self.label_smoothing} must lie in [0, 0.5)")
        if self.label_smoothing and self.loss != "sigmoid":
            raise UserError(f"preference.label_smoothing goes with preference.loss=sigmoid, not {self.loss}")
        if self.margin and self.loss != "simpo":
            raise UserError(f"preference.margin goes with preference.loss=simpo, not {self.loss}")


@dataclass(frozen=True)
class RLConfig:
    """Reinforcement learning: each step draws replies, rewards them and learns from them.

    GRPO is the default. GSPO: ratio=sequence, mean=sequence, clip_low=3e-4, clip_high=4e-4. Dr. GRPO: normalize=none,
    mean=fixed. DAPO: clip_high=0.28, resample=4, drop_cut=true. PPO-clip without a critic: baseline=others,
    normalize=batch, kl_estimator=k1.
    """

    tasks: tuple[str, ...] = ()
    """What to learn: tasks as `train/tasks/README.md` writes them, such as arithmetic?digits=1; mixed evenly."""
    rewards: tuple[str, ...] = ("task",)
    """What a reply is worth: task (its own grade), model:DIR (a reward model), judge:URL (an LLM at an endpoint)."""
    reward_weights: tuple[float, ...] = ()
    """What each reward is multiplied by; empty for 1."""
    prompts: int = 16
    """Prompts in a step."""
    samples: int = 8
    """Replies to each prompt: a group."""
    max_new_tokens: int = 64
    """Longest reply; of several turns, of each."""
    temperature: float = 1.0
    """Of drawing; the log-probabilities that are learnt from have it too."""
    thinking: bool = False
    """Let a model that can think before it answers do so."""
    updates: int = 1
    """Optimizer steps on the replies of one step, each with a part of the prompts."""
    ratio: Literal["token", "sequence"] = "token"
    """What is clipped: each token's ratio of probabilities (PPO, GRPO), or the mean of a reply's (GSPO, 2507.18071)."""
    clip_low: float = 0.2
    """A ratio counts down to 1 less this."""
    clip_high: float = 0.2
    """A ratio counts up to 1 and this."""
    mean: Literal["token", "sequence", "fixed"] = "token"
    """Of all tokens (DAPO), of replies' own means (GRPO), or a sum over replies x max_new_tokens (Dr. GRPO)."""
    baseline: Literal["group", "others"] = "group"
    """What a reward is compared with: the mean of its group, or of the others in it (RLOO, arXiv 2402.14740)."""
    normalize: Literal["group", "batch", "none"] = "group"
    """Divide advantages by the deviation of rewards in the group, of all advantages, or not (Dr. GRPO, 2503.20783)."""
    kl: float = 0.0
    """Weight of the divergence from the reference; 0 needs none."""
    kl_estimator: Literal["k3", "k1"] = "k3"
    """k3 is added to the loss; k1, which has no gradient of its own, is taken from the reward of the reply."""
    reference_model: str = ""
    """The MODEL that is the reference; empty for the one that the run starts from."""
    drop_cut: bool = False
    """Learn nothing from replies that were cut at max_new_tokens (DAPO's overlong filtering)."""
    resample: int = 0
    """Rounds of further prompts in the place of groups whose rewards are all equal (DAPO's dynamic sampling)."""
    truncate: float = 0.0
    """Weigh tokens by trainer / sampler probability, at most this (truncated importance sampling); 0: not at all."""
    replay: bool = False
    """Send each token to the experts that it went to when it was drawn (R3, arXiv 2510.11370)."""
    tools: tuple[str, ...] = ()
    """Tools that replies may call: calculator, python."""
    turns: int = 4
    """Most turns of a reply that calls tools."""
    judge_model: str = ""
    """The model to ask for at the judge's endpoint; empty for its first."""
    judge_prompt: str = "Rate the reply from 0 (useless) to 10 (perfect). Answer with the number alone."
    """What the judge is told before it reads prompt and reply."""
    judge_down: Literal["wait", "skip"] = "wait"
    """When the judge cannot be reached: ask again until it answers, or learn nothing from these replies."""
    slots: int = 64
    """Replies that are drawn at the same time."""
    validation_problems: int = 64
    """Held-out problems that are answered, greedily, at each validation."""

    def __post_init__(self) -> None:
        check_range(self, "rl.", 1, "prompts", "samples", "max_new_tokens", "updates", "turns", "slots")
        check_range(self, "rl.", 0, "clip_low", "clip_high", "kl", "resample", "truncate", "validation_problems")
        if not self.temperature > 0:
            raise UserError(
                f"rl.temperature={self.temperature} must be positive: the replies of a group have to differ"
            )
        if self.updates > self.prompts:
            raise UserError(f"rl.updates={self.updates} is more than rl.prompts={self.prompts}; each update needs one")
        if self.reward_weights and len(self.reward_weights) != len(self.rewards):
            raise UserError(
                f"rl.reward_weights has {len(self.reward_weights)} numbers for {len(self.rewards)} rl.rewards; one each"
            )
        if self.truncate and self.temperature != 1:
            raise UserError(
                f"rl.truncate compares probabilities as drawn: it goes with rl.temperature=1, not {self.temperature}"
            )


MOST_FROM_ENDPOINT = 20
"""Alternatives of a token that an endpoint gives at most."""


@dataclass(frozen=True)
class DistillConfig:
    """Learning from what a teacher says of every token (Qwen3, arXiv 2505.09388, section 4.5; GKD, 2306.13649)."""

    teacher: str = ""
    """Who teaches: a MODEL, or http(s)://HOST/v1, an endpoint that gives log-probabilities of prompts (at most 20)."""
    on_policy: bool = False
    """Learn from replies that the student draws to the prompts of `rl.tasks`, not from the rows of data.sources."""
    top_k: int = 0
    """The teacher's likeliest tokens that are compared, all others taken as one; 0: the whole vocabulary."""
    direction: Literal["forward", "reverse"] = "forward"
    """forward: KL(teacher || student), which covers all that the teacher says; reverse: KL(student || teacher)."""
    temperature: float = 1.0
    """Both distributions are softened by this, and the loss multiplied by its square (arXiv 1503.02531)."""
    mix: float = 0.0
    """Weight of the next-token loss on the same rows, beside the divergence."""

    @property
    def at_endpoint(self) -> bool:
        """Whether the teacher is asked over the network."""
        return self.teacher.startswith(("http://", "https://"))

    def __post_init__(self) -> None:
        check_range(self, "distill.", 0, "top_k", "mix")
        if not self.temperature > 0:
            raise UserError(f"distill.temperature={self.temperature} must be positive")
        if self.on_policy and self.mix:
            raise UserError(
                "distill.mix learns the next token of the rows, and with distill.on_policy the student wrote these "
                "itself; set distill.mix 0"
            )
        if self.at_endpoint and not 1 <= self.top_k <= MOST_FROM_ENDPOINT:
            raise UserError(
                f"distill.top_k={self.top_k} does not go with the endpoint {self.teacher}, which gives from 1 to "
                f"{MOST_FROM_ENDPOINT} tokens; choose a number among these, or a MODEL as distill.teacher"
            )
        if self.at_endpoint and self.temperature != 1:
            raise UserError(
                f"distill.temperature={self.temperature} needs all logits of the teacher, which no endpoint gives; "
                "leave it at 1, or choose a MODEL as distill.teacher"
            )


REWARDED = (
    "kl", "kl_estimator", "reference_model", "resample", "truncate", "replay", "drop_cut", "ratio", "mean", "baseline",
    "normalize", "clip_low", "clip_high",
)  # fmt: skip
"""Fields of RLConfig about learning from rewards, which nothing reads where replies are drawn for a teacher."""


def check_distillation(distill: DistillConfig, rl: RLConfig) -> None:
    """Refuses what cannot be distilled. UserError with the field to mend."""
    if not distill.teacher:
        raise UserError("objective=distill learns from a teacher; name a MODEL or an endpoint with distill.teacher")
    if not distill.on_policy:
        return
    if not rl.tasks:
        raise UserError(
            "distill.on_policy draws replies to prompts of tasks; name some with rl.tasks, such as arithmetic?digits=1"
        )
    plain, names = RLConfig(), [one.name for one in fields(rl) if one.name in REWARDED]
    changed = [name for name in names if getattr(rl, name) != getattr(plain, name)]
    if changed:
        raise UserError(
            f"rl.{changed[0]} is about learning from rewards, and objective=distill learns from a teacher; leave it out"
        )
