"""The demo model and its optimizer: a Llama in plain PyTorch, named as its checkpoint is.

Muon steps the matrices (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon), AdamW the
rest: Muon needs about half the tokens, and tokens are what a CPU is short of. Knows nothing of
text or files.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

VOCAB = 4096
N_WINDOW = 1024  # tokens of one training window; equals max_position_embeddings
LR_MATRIX, LR_REST, WEIGHT_DECAY = 0.02, 3e-3, 0.1
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": N_WINDOW,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "pad_token_id": None,
    "pretraining_tp": 1,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}


def rope_tables(n):
    dim = CONFIG["head_dim"]
    inverse = 1.0 / CONFIG["rope_theta"] ** (torch.arange(0, dim, 2).float() / dim)
    angles = torch.outer(torch.arange(n).float(), inverse)
    angles = torch.cat((angles, angles), -1)
    return angles.cos(), angles.sin()


def rope_apply(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(CONFIG["hidden_size"]))

    def forward(self, x):
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight, CONFIG["rms_norm_eps"])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        hidden, dim = CONFIG["hidden_size"], CONFIG["head_dim"]
        self.n_q, self.n_kv = CONFIG["num_attention_heads"], CONFIG["num_key_value_heads"]
        self.q_proj = nn.Linear(hidden, self.n_q * dim, bias=False)
        self.k_proj = nn.Linear(hidden, self.n_kv * dim, bias=False)
        self.v_proj = nn.Linear(hidden, self.n_kv * dim, bias=False)
        self.o_proj = nn.Linear(self.n_q * dim, hidden, bias=False)

    def forward(self, x, cos, sin):
        b, n, _ = x.shape
        heads = lambda y, count: y.view(b, n, count, -1).transpose(1, 2)
        q = rope_apply(heads(self.q_proj(x), self.n_q), cos, sin)
        k = rope_apply(heads(self.k_proj(x), self.n_kv), cos, sin)
        v = heads(self.v_proj(x), self.n_kv)
        k, v = (t.repeat_interleave(self.n_q // self.n_kv, 1) for t in (k, v))
        with torch.autocast("cpu", enabled=False):  # the f32 kernel is the faster one on a CPU
            y = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(b, n, -1))


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        hidden, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.input_layernorm = Norm()
        self.self_attn = Attention()
        self.post_attention_layernorm = Norm()
        self.mlp = Mlp()

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, CONFIG["hidden_size"])
        self.layers = nn.ModuleList(Layer() for _ in range(CONFIG["num_hidden_layers"]))
        self.norm = Norm()
        for name, p in self.named_parameters():
            if p.dim() == 2:
                depth = (
                    math.sqrt(2 * len(self.layers))
                    if name.endswith(("o_proj.weight", "down_proj.weight"))
                    else 1
                )
                nn.init.normal_(p, std=0.02 / depth)

    def forward(self, ids, targets):
        """ids, targets: [batch, tokens]; returns the mean cross-entropy in nats."""
        cos, sin = rope_tables(ids.shape[1])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.embed_tokens(ids)
            for layer in self.layers:
                x = layer(x, cos, sin)
            logits = F.linear(self.norm(x), self.embed_tokens.weight)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def orthogonalize(m):
    """Newton-Schulz iteration of Muon: the nearest semi-orthogonal matrix, roughly."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = m.bfloat16()
    is_tall = x.shape[0] > x.shape[1]
    x = x.T if is_tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if is_tall else x).float()


class Muon(torch.optim.Optimizer):
    def __init__(self, params, lr, momentum=0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["m"] = torch.zeros_like(p)
                state["m"].lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalize(p.grad.lerp(state["m"], group["momentum"]))
                p.mul_(1 - group["lr"] * WEIGHT_DECAY)
                p.add_(update, alpha=-group["lr"] * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)


def optimizers_create(model):
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.dim() != 2 or "embed" in n]
    return [
        Muon(matrices, LR_MATRIX),
        torch.optim.AdamW(rest, LR_REST, betas=(0.9, 0.95), weight_decay=0.01),
    ]
