#!/usr/bin/env python3
"""Output tokens per second of serving libraries on the shape of Qwen2.5-0.5B with random weights: 16
sequences at once, prompts of 128 random token ids, 64 tokens out, greedy, no end of sequence. No HTTP
and no waiting for arrivals lies between, which favours them. Run with the library's own Python.

usage: bench/library_peer.py make-ctranslate2 DIR         int8 weights in its own format (needs numpy)
       bench/library_peer.py make-openvino FILE.gguf      writes OpenVINO's files beside the GGUF
       bench/library_peer.py ctranslate2|openvino|vllm DIR [--requests 32] [--threads 2]
prints: engine,clients,requests,output tokens/s
"""
import argparse
import random
import time

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD, FFN, VOCAB = 24, 896, 14, 2, 64, 4864, 151936
CLIENTS, PROMPT, OUTPUT = 16, 128, 64


def prompts(n):
    r = random.Random(7)
    return [[r.randrange(300, VOCAB - 10) for _ in range(PROMPT)] for _ in range(n)]


def make_ctranslate2(folder):
    import numpy as np
    from ctranslate2.specs import common_spec, transformer_spec
    spec = transformer_spec.TransformerDecoderModelSpec.from_config(
        LAYERS, HEADS, activation=common_spec.Activation.SWISH, pre_norm=True, ffn_glu=True, rms_norm=True,
        rotary_dim=HEAD, rotary_interleave=False, rotary_base=1e6, num_heads_kv=KV_HEADS, head_dim=HEAD)
    rng = np.random.default_rng(1)

    def matrix(rows, columns):
        return rng.standard_normal((rows, columns), dtype=np.float32) / np.float32(columns ** 0.5)

    decoder = spec.decoder
    decoder.embeddings.weight = matrix(VOCAB, HIDDEN)
    decoder.scale_embeddings = False
    decoder.layer_norm.gamma = np.ones(HIDDEN, np.float32)
    decoder.projection.weight = decoder.embeddings.weight
    for layer in decoder.layer:
        attention, ffn = layer.self_attention, layer.ffn
        attention.layer_norm.gamma = ffn.layer_norm.gamma = np.ones(HIDDEN, np.float32)
        attention.linear[0].weight = matrix((HEADS + 2 * KV_HEADS) * HEAD, HIDDEN)
        attention.linear[0].bias = np.zeros((HEADS + 2 * KV_HEADS) * HEAD, np.float32)
        attention.linear[1].weight = matrix(HIDDEN, HEADS * HEAD)
        ffn.linear_0.weight, ffn.linear_0_noact.weight = matrix(FFN, HIDDEN), matrix(FFN, HIDDEN)
        ffn.linear_1.weight = matrix(HIDDEN, FFN)
    spec.register_vocabulary(["<unk>", "<s>", "</s>"] + [f"t{i}" for i in range(3, VOCAB)])
    spec.config.bos_token, spec.config.eos_token, spec.config.unk_token = "<s>", "</s>", "<unk>"
    spec.config.layer_norm_epsilon = 1e-6
    spec.validate()
    spec.optimize(quantization="int8")
    spec.save(folder)


def make_openvino(path):
    import openvino_genai
    openvino_genai.LLMPipeline(path, "CPU", enable_save_ov_model=True)


def ctranslate2(a):
    import ctranslate2 as library
    generator = library.Generator(a.path, device="cpu", compute_type="int8", inter_threads=1, intra_threads=a.threads)
    batches = [[[f"t{i}" for i in p] for p in group] for group in grouped(prompts(a.requests + CLIENTS))]

    def run(batch):
        answers = generator.generate_batch(batch, max_length=OUTPUT, min_length=OUTPUT, sampling_topk=1,
                                           include_prompt_in_result=False)
        return sum(len(x.sequences_ids[0]) for x in answers)
    run(batches[0][:2])
    begin = time.perf_counter()
    n = sum(run(b) for b in batches[1:])
    return f"CTranslate2 {library.__version__} int8", n / (time.perf_counter() - begin)


def grouped(all_prompts):
    return [all_prompts[i:i + CLIENTS] for i in range(0, len(all_prompts), CLIENTS)]


def openvino(a):
    import numpy as np
    import openvino as ov
    import openvino_genai as library
    scheduler = library.SchedulerConfig()
    scheduler.max_num_seqs, scheduler.max_num_batched_tokens = CLIENTS, a.batch_tokens
    scheduler.cache_size, scheduler.enable_prefix_caching = 1, False
    pipeline = library.ContinuousBatchingPipeline(a.path, scheduler, "CPU", {"INFERENCE_NUM_THREADS": a.threads})
    config = library.GenerationConfig()
    config.max_new_tokens = config.min_new_tokens = OUTPUT
    config.ignore_eos, config.do_sample = True, False

    def run(some):
        answers = pipeline.generate([ov.Tensor(np.array([p], np.int64)) for p in some], [config] * len(some))
        return sum(len(x.m_generation_ids[0]) for x in answers)
    run(prompts(2))
    begin = time.perf_counter()
    n = run(prompts(a.requests))
    return f"OpenVINO GenAI {library.__version__.split('-')[0]} q4_0 (GGUF)", n / (time.perf_counter() - begin)


def vllm(a):
    import vllm as library
    llm = library.LLM(model=a.path, load_format="dummy", dtype="bfloat16", max_num_seqs=CLIENTS, max_model_len=1024,
                      enable_prefix_caching=False, skip_tokenizer_init=True)
    params = library.SamplingParams(temperature=0, max_tokens=OUTPUT, min_tokens=OUTPUT, ignore_eos=True, detokenize=False)

    def run(some):
        answers = llm.generate([{"prompt_token_ids": p} for p in some], params, use_tqdm=False)
        return sum(len(x.outputs[0].token_ids) for x in answers)
    run(prompts(2))
    begin = time.perf_counter()
    n = run(prompts(a.requests))
    return f"vLLM CPU {library.__version__} bf16", n / (time.perf_counter() - begin)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["make-ctranslate2", "make-openvino", "ctranslate2", "openvino", "vllm"])
    p.add_argument("path")
    p.add_argument("--requests", type=int, default=32)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--batch-tokens", type=int, default=512)
    a = p.parse_args()
    if a.what.startswith("make-"):
        (make_ctranslate2 if a.what == "make-ctranslate2" else make_openvino)(a.path)
        return
    name, speed = {"ctranslate2": ctranslate2, "openvino": openvino, "vllm": vllm}[a.what](a)
    print(f"{name},{CLIENTS},{a.requests},{speed:.1f},,,,,{OUTPUT}", flush=True)


if __name__ == "__main__":
    main()
