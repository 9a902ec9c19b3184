"""Which model a set of weights is, whatever was done to its blocks.

What is calibrated, searched or packed holds for one set of weights and fails silently on others, so it is stored with
the fingerprint of its model and compared with the one at hand. Blocks are left out: quantizing them makes no other
model of it, and embedders and modulation alone tell checkpoints apart. Also fast, on the largest models too.
"""

import hashlib
import json

from torch import nn

from diffusion_opt.models.block_stack import block_stack


def fingerprint(transformer: nn.Module) -> str:
    """16 hex digits: a digest of a transformer's class, its configuration and the parameters outside its blocks."""
    digest = hashlib.sha256(transformer.__class__.__name__.encode())
    config = {key: value for key, value in transformer.config.items() if not key.startswith("_")}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    inside = {id(parameter) for block in block_stack(transformer).blocks for parameter in block.parameters()}
    for name, weight in sorted(transformer.named_parameters()):
        if id(weight) not in inside:
            digest.update(name.encode())
            digest.update(weight.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()[:16]
