"""Probabilities after temperature, top_k, top_p, min_p and repetition penalty, by transformers.

The order is that of GenerationMixin: repetition penalty, temperature, top_k, top_p, min_p, softmax.
"""

import json

import torch
from transformers import LogitsProcessorList, MinPLogitsWarper, RepetitionPenaltyLogitsProcessor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

ROWS = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 1000},
    {"top_p": 0.1},
    {"top_p": 0.5},
    {"top_p": 0.9},
    {"top_p": 0.999},
    {"min_p": 0.05},
    {"min_p": 0.5},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.8},
    {"repetition_penalty": 2.0, "top_k": 4},
    {"temperature": 0.7, "top_k": 10, "top_p": 0.9},
    {"temperature": 1.5, "top_p": 0.8},
    {"temperature": 0.8, "min_p": 0.1},
    {"temperature": 1.3, "top_k": 12, "top_p": 0.95, "min_p": 0.02},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.1},
    {"temperature": 0.01},
    {"temperature": 0.9, "top_k": 3, "repetition_penalty": 1.2},
]
MAKERS = [
    ("repetition_penalty", RepetitionPenaltyLogitsProcessor),
    ("temperature", TemperatureLogitsWarper),
    ("top_k", TopKLogitsWarper),
    ("top_p", TopPLogitsWarper),
    ("min_p", MinPLogitsWarper),
]


def probabilities(logits, history, params):
    steps = LogitsProcessorList(make(params[name]) for name, make in MAKERS if name in params)
    ids = torch.tensor([history], dtype=torch.long)
    return torch.softmax(steps(ids, logits[None].clone()), -1)[0]


def number(x):
    return float(f"{x:.9g}")


def sampling_write(path):
    """Vectors of 32 logits: a wide one, a flat one, one with a dominant token."""
    rand = torch.Generator().manual_seed(7)
    wide = torch.randn(32, generator=rand) * 3
    flat = torch.randn(32, generator=rand) * 0.3
    peak = torch.randn(32, generator=rand)
    peak[17] = 9.0
    # All stored logits have at most 9 digits and read back to the same float32.
    vectors = {"wide": wide, "flat": flat, "peak": peak}
    cases = []
    for vector, logits in vectors.items():
        top = torch.topk(logits, 3).indices.tolist()
        history = [top[0], 3, 9, 9, 21, top[2], 30]
        for params in ROWS:
            probs = [number(p) for p in probabilities(logits, history, params).tolist()]
            cases.append({"logits": vector, "history": history, "params": params, "probs": probs})
    lines = ['{"logits": {']
    lines.append(
        ",\n".join(
            f' "{k}": {json.dumps([number(x) for x in v.tolist()])}' for k, v in vectors.items()
        )
    )
    lines.append('}, "cases": [')
    lines.append(",\n".join(" " + json.dumps(c) for c in cases))
    lines.append("]}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
