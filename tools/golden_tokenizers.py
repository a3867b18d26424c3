"""Small tokenizers of the kinds that real models carry, and what they must return.

llama: SentencePiece-type BPE (no pre-tokenizer, "▁", byte_fallback), as Llama 2 and Mistral.
llama3, qwen2: byte-level BPE behind the Split patterns of Llama 3 and Qwen 2.
gpt2: plain byte-level BPE, <|endoftext|> as the last id.
"""

import json
import re

import demo_corpus
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers import processors, trainers

SPLIT_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLIT_QWEN2 = SPLIT_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

TEXTS = [
    "",
    " ",
    "a",
    "The fox saw the grapes.",
    " leading space",
    "trailing space ",
    "two  spaces   three",
    "line one\nline two\n\n\nline five",
    "tabs\tand\r\nreturns\r",
    "\n",
    "   \n   x",
    "don't we'll I'M you're",
    "1234567890 12 3.14159",
    "naïve café Ærøskøbing",
    "cafe\u0301 combining",
    "Größe straße",
    "你好，世界",
    "こんにちは",
    "Привет, мир",
    "مرحبا",
    "🙂🚀 emoji 👩‍👩‍👧",
    "\u00a0nbsp\u2003em",
    "\x00\x01 control \x7f",
    "snake_case camelCase x+=1;",
    "(parentheses) [brackets] {braces} <angles>",
    "http://example.org/a?b=c&d=%20",
    "ALL CAPS Mixed Case",
    "!!!???...---",
    "<s> looks special",
    "</s><|endoftext|>",
    "text<|endoftext|>more",
    "a" * 100,
    "ﬁ ligature Ⅷ roman ² super",
    "zero\u200bwidth",
    "\ufeffbom",
    "The Lion and the Mouse became friends " * 5,
]

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "[{{ message['role'] }}] {{ message['content'] | trim }}"
    "{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)


def texts_read(corpus):
    path = demo_corpus.book_find(corpus, "Aesop_-_Aesops_Fables")
    return [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def sentencepiece_make(texts, vocab_size):
    """Trained with word pieces, then rebuilt in the layout of a converted SentencePiece model."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    n = vocab_size - 3 - 256
    trained.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=n, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)]
    pieces += sorted(model["vocab"], key=model["vocab"].get)
    tokenizer = Tokenizer(
        models.BPE(
            vocab={p: i for i, p in enumerate(pieces)},
            merges=[tuple(m) for m in model["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.add_special_tokens(
        [AddedToken(s, special=True, normalized=False) for s in pieces[:3]]
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer, "<s>", "</s>"


def bytelevel_train(texts, vocab_size, specials, pre_tokenizer, normalizer=None):
    tokenizer = Tokenizer(models.BPE())
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            show_progress=False,
            special_tokens=[AddedToken(s, special=True, normalized=False) for s in specials],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return tokenizer


def split_make(texts, vocab_size, pattern, normalizer):
    pre = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    tokenizer = bytelevel_train(texts, vocab_size, specials, pre, normalizer)
    if normalizer is None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|begin_of_text|> $A",
            pair="<|begin_of_text|> $A <|begin_of_text|> $B",
            special_tokens=[("<|begin_of_text|>", 0)],
        )
    return tokenizer, specials[0], specials[1]


def gpt2_make(texts, vocab_size):
    """Trained one short, so that <|endoftext|> takes the last id as in GPT-2."""
    pre = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer = bytelevel_train(texts, vocab_size - 1, [], pre)
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer, "<|endoftext|>", "<|endoftext|>"


def tokenizer_write(name, folder, vocab_size, texts):
    """tokenizer.json, tokenizer_config.json and tokens.json for the models that carry one."""
    if name == "llama":
        tokenizer, bos, eos = sentencepiece_make(texts, vocab_size)
    elif name == "llama3":
        tokenizer, bos, eos = split_make(texts, vocab_size, SPLIT_LLAMA3, None)
    elif name == "qwen2":
        tokenizer, bos, eos = split_make(texts, vocab_size, SPLIT_QWEN2, normalizers.NFC())
    elif name == "gpt2":
        tokenizer, bos, eos = gpt2_make(texts, vocab_size)
    else:
        return
    assert tokenizer.get_vocab_size() == vocab_size, tokenizer.get_vocab_size()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    cases = [case_make(tokenizer, text) for text in TEXTS]
    text = json.dumps({"cases": cases}, indent=1, ensure_ascii=True)
    text = re.sub(r"\[\s+([-0-9,\s]+?)\s+\]", lambda m: "[" + re.sub(r"\s+", " ", m[1]) + "]", text)
    (folder / "tokens.json").write_text(text + "\n")


def case_make(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return {
        "text": text,
        "ids": ids,
        "ids_with_special": tokenizer.encode(text).ids,
        "decoded": tokenizer.decode(ids, skip_special_tokens=False),
        "decoded_skip_special": tokenizer.decode(ids, skip_special_tokens=True),
    }
