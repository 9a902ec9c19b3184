"""Prompts as classes: the text of a fixed list of prompts, encoded once, so that the text encoder can leave the memory.

The methods of this repository condition on a class. For a model that takes text a "class" is a prompt of a list: label
i stands for the encoded prompt i, the label after the last for the empty prompt that guidance needs. A distillation
run needs a few thousand prompts and no text encoder; whatever trained on classes trains on prompts without a change.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from diffusion_opt.flow import ClassCondition
from diffusion_opt.models.flux2 import TokenCondition


class PromptTable(nn.Module):
    """Encoded prompts (P, L, D) and the encoded empty prompt (1, L, D); labels (B,) -> tokens (B, L, D)."""

    def __init__(self, tokens: Float[Tensor, "p l d"], null: Float[Tensor, "1 l d"]) -> None:
        super().__init__()
        self.register_buffer("table", torch.cat([tokens, null]), persistent=False)

    def __deepcopy__(self, memo: dict) -> "PromptTable":
        return self  # constant and large: copies of a network share it

    @property
    def num_prompts(self) -> int:
        """Prompts without the empty one: `num_classes` for the methods."""
        return len(self.table) - 1

    def forward(self, labels: Int[Tensor, " b"]) -> Float[Tensor, "b l d"]:
        return self.table[labels]


def text_of(condition: ClassCondition | TokenCondition | None, prompts: PromptTable | None) -> Float[Tensor, "b l d"]:
    """The text stream of a condition: its own tokens, or those of the prompt that its label names.

    Raises ValueError for None, and for labels without a table or a table of another length.
    """
    if isinstance(condition, TokenCondition):
        return condition.tokens
    if condition is None:
        raise ValueError("this model always has a text stream: pass condition.drop() for no condition, not None")
    if prompts is None or prompts.num_prompts != condition.num_classes:
        have = "no table of prompts" if prompts is None else f"a table of {prompts.num_prompts} prompts"
        raise ValueError(f"the condition names one of {condition.num_classes} prompts, and the model has {have}")
    return prompts(condition.labels)
