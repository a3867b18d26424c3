"""Makes tests/golden/*/beams.json: beam searches of Hugging Face transformers over the checkpoints there.

    python3 tools/make_beams.py [--golden tests/golden] [--only NAME ...]

Each case has its own width, length penalty, early stopping and stop ids; tests/golden/README.md
describes the format. Cases whose neighbouring scores lie closer than a sum in another order may
shift are drawn again. Made with torch 2.15.0, transformers 5.23.0.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from make_golden import json_write, model_load

MODELS = ("llama", "qwen2", "gpt2", "opt", "mistral", "qwen3")
SCORE_GAP_MIN = 2e-4
#        prompt, beams, length penalty, early stopping, new tokens, stop ids
SHAPES = [
    (9, 2, 1.0, False, 20, 0),
    (33, 3, 0.0, False, 24, 1),
    (7, 4, 2.0, False, 24, 1),
    (12, 4, -0.7, False, 16, 2),
    (20, 5, 1.0, True, 24, 1),
    (5, 3, 0.6, True, 30, 2),
    (40, 4, 1.0, "never", 20, 1),
    (7, 8, 1.3, False, 16, 1),
]


def search(model, ids, shape, stops):
    _, width, penalty, early, n_new, _ = shape
    out = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        num_beams=width,
        num_return_sequences=width,
        length_penalty=penalty,
        early_stopping=early,
        do_sample=False,
        max_new_tokens=n_new,
        eos_token_id=stops or None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    beams = []
    for row, score in zip(out.sequences.tolist(), out.sequences_scores.tolist()):
        tokens = row[len(ids) :]
        ends = [i for i, t in enumerate(tokens) if t in stops]
        beams.append(
            {"tokens": tokens[: ends[0] + 1] if ends else tokens, "score": float(f"{score:.9g}")}
        )
    return beams


def case(model, shape, rand):
    length, width, penalty, early, n_new, n_stops = shape
    for _ in range(400):
        ids = rand.integers(3, model.config.vocab_size - 1, length).tolist()
        stops = []
        beams = search(model, ids, shape, stops)
        if n_stops:
            said = sorted({t for b in beams for t in b["tokens"][3:]})
            stops = [int(t) for t in rand.choice(said, min(n_stops, len(said)), replace=False)]
            beams = search(model, ids, shape, stops)
            if not any(b["tokens"][-1] in stops and len(b["tokens"]) > 2 for b in beams):
                continue
        scores = [b["score"] for b in beams]
        if min(a - b for a, b in zip(scores, scores[1:])) < SCORE_GAP_MIN:
            continue
        return {
            "ids": ids, "num_beams": width, "length_penalty": penalty, "early_stopping": early,
            "max_new_tokens": n_new, "eos_token_id": stops, "beams": beams,
        }
    raise SystemExit(f"no case of shape {shape} found")


def main():
    torch.set_num_threads(1)
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--golden", default="tests/golden", type=Path)
    p.add_argument("--only", nargs="*", default=MODELS)
    a = p.parse_args()
    for seed, name in enumerate(MODELS):
        if name not in a.only:
            continue
        model = model_load(a.golden / name, torch.float32)
        model.generation_config.eos_token_id = None
        rand = np.random.default_rng(1000 + seed)
        json_write(a.golden / name / "beams.json", {"cases": [case(model, s, rand) for s in SHAPES]})
        print(name, "done", flush=True)


if __name__ == "__main__":
    main()
