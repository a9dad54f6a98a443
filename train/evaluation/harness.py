"""A MODEL inside lm-evaluation-harness, in its own process: `python -m train.evaluation.harness run --model qmax ...`.

    pip install lm-eval
    python -m train.evaluation.harness run --model qmax --model_args model=runs/demo/sft --tasks arc_easy

or `import train.evaluation.harness` before `lm_eval.simple_evaluate("qmax", {"model": "runs/demo/sft"}, ...)`.
"""

from __future__ import annotations

from typing import Any

from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]
from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]

from errors import UserError
from serve.sampling_params import SamplingParams
from sharding.runtime import configure_jax
from train.evaluation.local import Local
from train.tasks.likelihood import Continuation

DEFAULT_TOKENS = 256
"""Longest reply where a task does not say."""
UNDERSTOOD = {"until", "max_gen_toks", "max_new_tokens", "temperature", "top_p", "top_k", "do_sample", "seed"}


@register_model("qmax")
class HarnessModel(LM):
    """A model's answers in the harness's own form.

    Args:
        model: any MODEL. slots, batch_size: as `Local` has them; batch_size is taken and not needed.
    """

    def __init__(self, model: str, slots: int | None = None, batch_size: Any = None, **_: Any) -> None:
        super().__init__()
        configure_jax()
        self.local = Local(model, slots=slots)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each (context, continuation) its log-probability, and whether it is what greedy decoding gives."""
        found = self.local.likelihoods([Continuation(*one.args) for one in requests], lambda _: None)
        return [(one.logprob, one.greedy) for one in found]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probabilities of whole texts."""
        asked = [Continuation("", one.args[0]) for one in requests]
        return [one.logprob for one in self.local.likelihoods(asked, lambda _: None)]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What follows each text up to one of its stop strings."""
        texts, settings = zip(*(one.args for one in requests), strict=True) if requests else ((), ())
        stops = [[until] if isinstance(until := one.get("until") or [], str) else list(until) for one in settings]
        return self.local.continuations(texts, [sampling_of(one) for one in settings], stops)

    @property
    def tokenizer_name(self) -> str:
        """What tells two tokenizers apart in the harness's cache."""
        return self.local.tokenizer.fingerprint

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The model's own; the harness keeps it beside its results."""
        return "the model's own"

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text."""
        return self.local.tokenizer.render(chat_history, add_generation_prompt=add_generation_prompt)


def sampling_of(settings: dict[str, Any]) -> SamplingParams:
    """A task's generation settings as ours. UserError for one that would change the reply and is not known."""
    unknown = sorted(settings.keys() - UNDERSTOOD)
    if unknown:
        raise UserError(f"the task asks for {', '.join(unknown)}, which qmax does not know; leave it out of gen_kwargs")
    tokens = settings.get("max_gen_toks") or settings.get("max_new_tokens") or DEFAULT_TOKENS
    greedy = not settings.get("do_sample", settings.get("temperature", 0) > 0)
    return SamplingParams(
        temperature=0.0 if greedy else float(settings.get("temperature", 1.0)),
        top_p=float(settings.get("top_p", 1.0)),
        top_k=int(settings.get("top_k", 0)),
        max_tokens=int(tokens),
        seed=int(settings.get("seed", 0)),
    )


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    cli_evaluate()
