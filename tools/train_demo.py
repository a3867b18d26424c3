"""Trains the demo model: a few million parameters that write plain story English.

    python3 tools/train_demo.py --corpus DIR --out models/demo [--steps N] [--resume]

DIR holds the Markdown books named in tools/demo_corpus.py. Out comes a complete Hugging Face
folder: a byte-level BPE tokenizer, a Llama-architecture checkpoint in bf16, a chat template.
A run is reproducible: fixed seed, one thread, deterministic algorithms; --resume goes on from the
last state as if never interrupted, and the rate is constant over the first 60 % of --steps, so that
--steps may be changed until then. models/demo/README.md has the commands of the published model,
made with Python 3.11.7, torch 2.15.0 and tokenizers 0.23.3 on an AVX-512 BF16 CPU; another CPU or
torch sums in another order and gives a slightly different model.
"""

import argparse
import json
import os
import random
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn

import demo_corpus as corpus
from demo_model import CONFIG, LR_MATRIX, LR_REST, N_WINDOW, VOCAB, Llama, optimizers_create

N_WINDOWS_STEP = 4
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + "
    "(message['content'] | trim) + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


# Tokens and the schedule.


def decay_part(step, n_steps):
    """0 in the constant phase, rising to 1 over the last 40 % of the steps."""
    return max(0.0, (step - 0.6 * n_steps) / (0.4 * n_steps))


def rate_scale(step, n_steps):
    """Warm-up, constant, linear down to 2 %; --steps may still change in the constant phase."""
    return min((step + 1) / 50, 1 - 0.98 * decay_part(step, n_steps))


def tokenizer_train(books):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    specials = [AddedToken(s, special=True, normalized=False) for s in corpus.SPECIALS]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (p for w, sections in books if w >= 0.5 for _, ps in sections for p in ps)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A",
        pair="<|begin|> $A $B",
        special_tokens=[("<|begin|>", tokenizer.token_to_id("<|begin|>"))],
    )
    return tokenizer


def epoch_windows(books, tokenizer, seed, epoch):
    """[windows, N_WINDOW + 1] token ids of one epoch, in training order."""
    rand = random.Random(seed * 1000 + epoch)
    ids = []
    for doc in corpus.epoch_documents(books, rand):
        for is_special, text in doc:
            if is_special:
                ids.append(tokenizer.token_to_id(text))
            else:
                ids += tokenizer.encode(text, add_special_tokens=False).ids
    n = (len(ids) - 1) // N_WINDOW
    windows = [ids[i * N_WINDOW : (i + 1) * N_WINDOW + 1] for i in range(n)]
    rand.shuffle(windows)
    return torch.tensor(windows)


def batch_get(stream, step, n_steps):
    """ids, targets of a step; short rows first, which is cheaper, long ones at the end."""
    part = decay_part(step, n_steps)
    n_row = N_WINDOW // 4 if part == 0 else N_WINDOW // 2 if part < 0.5 else N_WINDOW
    batch = stream(step)
    return batch[:, :-1].reshape(-1, n_row), batch[:, 1:].reshape(-1, n_row)


class Stream:
    """Batch of any step, making one epoch at a time."""

    def __init__(self, books, tokenizer, seed):
        self.args, self.first, self.epoch = (books, tokenizer, seed), 0, 0
        self.windows = epoch_windows(*self.args, 0)

    def __call__(self, step):
        while step >= self.first + len(self.windows) // N_WINDOWS_STEP:
            self.first += len(self.windows) // N_WINDOWS_STEP
            self.epoch += 1
            self.windows = epoch_windows(*self.args, self.epoch)
        at = (step - self.first) * N_WINDOWS_STEP
        return self.windows[at : at + N_WINDOWS_STEP]


@torch.no_grad()
def heldout_loss(model, ids):
    """Mean loss in nats a token over independent windows."""
    losses, counts = 0.0, 0
    for at in range(0, len(ids) - 1, N_WINDOW // 2):
        part = ids[at : at + N_WINDOW // 2 + 1]
        loss = model(part[None, :-1], part[None, 1:])
        losses += loss.item() * (len(part) - 1)
        counts += len(part) - 1
    return losses / counts


# Output.


def export(model, tokenizer, heldout, out):
    out.mkdir(parents=True, exist_ok=True)
    tensors = {
        "model." + n: p.detach().bfloat16().contiguous() for n, p in model.named_parameters()
    }
    save_file(tensors, out / "model.new", metadata={"format": "pt"})
    (out / "model.new").chmod(0o644)
    os.replace(out / "model.new", out / "model.safetensors")  # a reader keeps its whole old file
    tokenizer.save(str(out / "tokenizer.json"))
    files = {
        "config.json": CONFIG,
        "generation_config.json": {
            "bos_token_id": 1,
            "eos_token_id": 0,
            "do_sample": True,
            "temperature": 0.7,
            "top_k": 50,
            "top_p": 0.9,
            "repetition_penalty": 1.1,
            "max_new_tokens": 256,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": corpus.BEGIN,
            "eos_token": corpus.END,
            "pad_token": None,
            "unk_token": None,
            "clean_up_tokenization_spaces": False,
            "model_max_length": N_WINDOW,
            "chat_template": CHAT_TEMPLATE,
        },
    }
    for name, value in files.items():
        (out / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    (out / "heldout.txt").write_text(heldout, encoding="utf-8")


def state_save(path, step, model, optimizers):
    state = {
        "step": step,
        "model": model.state_dict(),
        "optimizers": [o.state_dict() for o in optimizers],
    }
    torch.save(state, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def train(args, model, optimizers, tokenizer, books, heldout, first):
    stream = Stream(books, tokenizer, args.seed)
    heldout_ids = torch.tensor(tokenizer.encode(heldout).ids)
    start, saved, mean = time.time(), time.time(), None
    for step in range(first, min(args.steps, args.stop)):
        for optimizer, rate in zip(optimizers, (LR_MATRIX, LR_REST)):
            optimizer.param_groups[0]["lr"] = rate * rate_scale(step, args.steps)
        loss = model(*batch_get(stream, step, args.steps))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        if (step + 1) % 25 == 0:
            speed = (time.time() - start) / (step + 1 - first)
            print(
                f"step {step + 1} epoch {stream.epoch} loss {mean:.3f} {speed:.2f} s/step",
                flush=True,
            )
        if (step + 1) % 250 == 0 or step + 1 == args.steps:
            print(
                f"step {step + 1} held-out loss {heldout_loss(model, heldout_ids):.4f}", flush=True
            )
        if time.time() - saved > args.save_s or step + 1 in (args.steps, args.stop):
            state_save(args.state, step + 1, model, optimizers)
            export(model, tokenizer, heldout, args.out)
            saved = time.time()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("models/demo"))
    parser.add_argument("--state", type=Path, default=Path("build/train_demo.state"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument(
        "--stop", type=int, default=1 << 30, help="end early, to go on by another plan"
    )
    parser.add_argument("--save-s", type=float, default=240, help="seconds between checkpoints")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)  # one is also the fastest beside other work
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.manual_seed(args.seed)
    args.state.parent.mkdir(parents=True, exist_ok=True)

    books, heldout = corpus.corpus_read(args.corpus)
    tokenizer = tokenizer_train(books)
    assert tokenizer.get_vocab_size() == VOCAB
    model = Llama()
    optimizers = optimizers_create(model)
    n_params = sum(p.numel() for p in model.parameters())
    print(
        f"{n_params} parameters, {len(tokenizer.encode(heldout).ids)} held-out tokens", flush=True
    )
    first = 0
    if args.resume and args.state.exists():
        state = torch.load(args.state, weights_only=True)
        first = state["step"]
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
    train(args, model, optimizers, tokenizer, books, heldout, first)


if __name__ == "__main__":
    main()
