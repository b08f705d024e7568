"""Write the tables of backbones.md from the JSON files in backbones/.

Command:   python experiments/throughput/tables.py    (backbones.sh runs it)
"""

import json
import re
from pathlib import Path

HERE = Path(__file__).parent
AIMS = {
    "mamba2": 0.45,
    "mamba": 0.08,
    "rg_lru": 0.35,
    "mlstm": 0.45,
    "ttt_linear": 0.35,
    "titans_mac": 0.3,
    "mom": 0.3,
    "samba": 0.45,
    "griffin": 0.45,
    "gdn_h1": 0.45,
    "mamba2_attention": 0.45,
}
SCAN_ROWS = {
    "chunked": '`impl="xla"`',
    "compiled_loop": "token loop, compiled as one program",
    "eager_torch_loop": "token loop in PyTorch, eager",
    "eager_jax_loop": "token loop in JAX, eager",
}


def read(name: str) -> dict | None:
    path = HERE / "backbones" / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def steps() -> list[str]:
    """Training steps: the aims first, then what has none."""
    names = [path.stem for path in (HERE / "backbones").glob("*.json")]
    names = [name for name in names if name not in ("growth", "selective_scan")]
    rows = [
        "| variant | seconds a step | roof, GFLOP/s | share of the roof | aim | state a sequence |",
        "|---|---|---|---|---|---|",
    ]
    for name in sorted(names, key=lambda name: (name not in AIMS, name)):
        r = read(name)
        roof, state = r["roof_flops_per_s"] / 1e9, r["state_bytes_per_sequence"] / 1024
        aim = f"{AIMS[name]:.2f}" if name in AIMS else ""
        rows.append(
            f"| `{name}` | {r['seconds_per_step']:.3f} | {roof:.0f} | {r['mfu']:.2f} | {aim} "
            f"| {state:,.0f} KiB |"
        )
    return rows


def growth() -> list[str]:
    rows = [
        "| kind | slope | at 1,000 tokens | at 50,000 tokens | ratio |",
        "|---|---|---|---|---|",
    ]
    for kind, r in sorted((read("growth") or {}).items()):
        first, last = r["decode_seconds_per_token"].values()
        rows.append(
            f"| `{kind}` | {r['slope']:.2f} | {1e6 * first:.0f} us | {1e6 * last:.0f} us "
            f"| {last / first:.2f} |"
        )
    return rows


def scan() -> list[str]:
    rows = ["| | forward | times | forward and backward | times |", "|---|---|---|---|---|"]
    for name, times in (read("selective_scan") or {}).items():
        cells = [SCAN_ROWS[name]]
        for key in ("forward", "forward_and_backward"):
            if times is None or key not in times:
                cells += ["not measured", ""]
            else:
                cells += [f"{1e3 * times[key]:.1f} ms", f"{times['over_chunked'][key]:.1f}"]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def main() -> None:
    page = HERE / "backbones.md"
    text = page.read_text()
    for name, rows in {"steps": steps(), "growth": growth(), "scan": scan()}.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        table = "\n".join(rows) + "\n"
        text = re.sub(f"{begin}.*?{end}", lambda _: begin + table + end, text, flags=re.DOTALL)  # noqa: B023
    page.write_text(text)


if __name__ == "__main__":
    main()
