"""Time flash-linear-attention's Triton kernels, to compare with `python -m pallas_kernels.bench`.

    python flash_linear_attention.py warm RANK RANKS OPS  # optional, side by side
    python flash_linear_attention.py time FILE.json OPS

OPS: simple_gla,gated_delta. `warm` compiles one of RANKS parts of the configurations that its tuner
tries; `time` tunes (with the median of five runs each; configurations of one or eight warps are
left out where there are more than 24) and times: 32,768 tokens, 16 heads, K = V = 128, bfloat16.
"""

import json
import sys

import torch
import triton
from triton.runtime.autotuner import Autotuner

HEADS, SIZE, TOTAL, LENGTHS = 16, 128, 32768, (2048, 8192, 32768)
WARM = sys.argv[1] == "warm"


def bench(call, quantiles=None):
    call()
    torch.cuda.synchronize()
    if WARM:
        return [1.0, 1.0, 1.0]
    times = []
    for _ in range(5):
        start, end = torch.cuda.Event(True), torch.cuda.Event(True)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    times.sort()
    return [times[2], times[1], times[3]]


def fewer(prune):
    def pruned(tuner, arguments):
        configs = prune(tuner, arguments)
        if len(configs) > 24:
            configs = [config for config in configs if config.num_warps in (2, 4, 8)]
        if WARM:
            rank, ranks = int(sys.argv[2]), int(sys.argv[3])
            configs = configs[rank::ranks] or [configs[rank % len(configs)]]
        return configs

    return pruned


Autotuner.do_bench = property(lambda tuner: bench)
Autotuner.prune_configs = fewer(Autotuner.prune_configs)

import fla.ops.common.chunk_o  # noqa: E402  after the tuner has been changed
from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # noqa: E402
from fla.ops.simple_gla import chunk_simple_gla  # noqa: E402

# On Hopper it refuses gated backward passes with Triton 3.4 to 3.7.0: their results are wrong.
# Times are wanted alone.
fla.ops.common.chunk_o.TRITON_ABOVE_3_7_1 = True


def simple_gla(q, k, v, g):
    return chunk_simple_gla(q, k, v, g, output_final_state=True)


def gated_delta(q, k, v, g, beta):
    return chunk_gated_delta_rule(q, k, v, g, beta, output_final_state=True)


def inputs(op, batch, tokens):
    sizes = (batch, tokens, HEADS, SIZE)
    q, k, v = (torch.randn(sizes, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    k = torch.nn.functional.normalize(k.float(), dim=-1).bfloat16()
    args = [q, k, v, -torch.exp(torch.randn(sizes[:3], device="cuda") - 3)]
    if op is gated_delta:
        args.append(torch.rand(sizes[:3], device="cuda").bfloat16())
    return [x.requires_grad_(True) for x in args]


def main():
    rows = []
    for name in sys.argv[-1].split(","):
        op = {"simple_gla": simple_gla, "gated_delta": gated_delta}[name]
        for tokens in LENGTHS[:1] if WARM else LENGTHS:
            args = inputs(op, (4096 if WARM else TOTAL) // tokens, tokens)

            def forward(op=op, args=args):
                with torch.no_grad():
                    return op(*args)

            def both(op=op, args=args):
                o, _ = op(*args)
                return torch.autograd.grad((o,), args, (torch.ones_like(o),))

            forward()
            both()
            if WARM:
                continue
            times = [triton.testing.do_bench(f, return_mode="median") for f in (forward, both)]
            rows.append({"op": name, "tokens": tokens, "forward_ms": times[0], "both_ms": times[1]})
            print(rows[-1], flush=True)
    if not WARM:
        report = {"device": torch.cuda.get_device_name(), "triton": triton.__version__}
        with open(sys.argv[2], "w") as file:
            json.dump(report | {"results": rows}, file, indent=2)


main()
