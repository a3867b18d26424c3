#!/usr/bin/env python3
"""The peer of the GPU suite: transformers on the same card with random weights of the same shape.
usage: gpu_peer.py MODEL_DIR; prints CSV: tokens a second of decoding, and of reading 2048 tokens."""
import sys
import time

import torch
from transformers import AutoConfig, AutoModelForCausalLM


def main():
    config = AutoConfig.from_pretrained(sys.argv[1])
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = AutoModelForCausalLM.from_config(config).eval()
    print("peer,batch,prompt,output,tokens_s")
    for batch, prompt, output in ((1, 512, 128), (16, 512, 64), (1, 2048, 1)):
        ids = torch.randint(300, config.vocab_size - 10, (batch, prompt), device="cuda")
        for timed in (False, True):
            torch.cuda.synchronize()
            begun = time.perf_counter()
            with torch.no_grad():
                model.generate(ids, max_new_tokens=output, min_new_tokens=output, do_sample=False, pad_token_id=0)
            torch.cuda.synchronize()
            seconds = time.perf_counter() - begun
        made = batch * (output if output > 1 else prompt)
        print("transformers,%d,%d,%d,%.1f" % (batch, prompt, output, made / seconds), flush=True)


main()
