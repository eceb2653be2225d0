"""Count what cpp/edge/fastopt.h takes on ARM, under QEMU: instructions a weight, and bytes of code.

A product is emulated twice, an instruction at a time, with more rows the second time; the difference is what its rows
take, with scales, minima and all.
"""

import re
import subprocess
import tempfile
from pathlib import Path

EDGE = Path(__file__).parents[1] / "cpp" / "edge"
BOARD = EDGE / "example"
M4 = ["arm-none-eabi-gcc", "-mcpu=cortex-m4", "-mthumb", "-mfloat-abi=hard", "-mfpu=fpv4-sp-d16", "-ffreestanding"]
M4 += ["-nostartfiles", f"-T{BOARD / 'cortex-m.ld'}", "-Wl,--build-id=none", str(BOARD / "board.c")]
SYSTEM = ["qemu-system-arm", "-display", "none", "-monitor", "none", "-serial", "none", "-semihosting-config"]
SYSTEM += ["enable=on,target=native", "-machine", "mps2-an386", "-kernel"]
A64 = ["aarch64-linux-gnu-gcc", "-static"]
TARGETS = {
    "Cortex-A76, dot product": ([*A64, "-O2", "-mcpu=cortex-a76"], ["qemu-aarch64", "-cpu", "max"]),
    "Cortex-A72, NEON": ([*A64, "-O2", "-mcpu=cortex-a72"], ["qemu-aarch64", "-cpu", "cortex-a72"]),
    "Cortex-M4, -O2": ([*M4, "-O2"], SYSTEM),
    "Cortex-M4, -Os": ([*M4, "-Os"], SYSTEM),
}
WEIGHTS = 8 * 1024  # of the rows by which products of edge_count.c differ
OPTIONS = ["-std=c99", "-ffunction-sections", "-fdata-sections", "-Wl,--gc-sections", f"-I{EDGE}"]

# Counted in the inner loops of their sources, an instruction for each intrinsic, load and branch. One scale for 32
# weights without a minimum (ggml), or for a row (CMSIS-NN).
OTHERS = {
    "ggml_vec_dot_q8_0_q8_0, NEON with dot product": (16, 32),
    "ggml_vec_dot_q4_0_q8_0, NEON with dot product": (18, 32),
    "arm_nn_vec_mat_mult_t_s8, DSP, two rows at a time": (15, 8),
    "arm_nn_vec_mat_mult_t_s4, DSP, two rows at a time": (33, 8),
}


def instructions(compiler: list[str], emulator: list[str], folder: Path) -> list[int]:
    """Return the instructions of each product of edge_count.c."""
    program, log, counts = folder / "count", folder / "log", [0]
    subprocess.run([*compiler, *OPTIONS, Path(__file__).parent / "edge_count.c", "-o", program], check=True)
    trace = ["-singlestep", "-d", "nochain,exec", "-D", str(log)]
    subprocess.run([emulator[0], *trace, *emulator[1:], program], check=True)
    inside = False
    with log.open() as lines:
        for line in lines:
            if not line.startswith("Trace "):
                continue
            if line.endswith(" mark\n"):
                if not inside:
                    counts.append(0)
                inside = True
            else:
                inside = False
                counts[-1] += 1
    return counts[1:-1]  # without what comes before the first mark, and after the last


def code_bytes(compiler: list[str], folder: Path) -> int:
    """Return the bytes of code of a program with both products, of all widths, less those of an empty one."""
    sizes = []
    for body in ("fo_linear(w, w, x, 0, y, 0) + fo_linear_int8(w, w, n, x, 0, y, 0)", "0"):
        source = folder / "size.c"
        source.write_text(
            '#define FASTOPT_IMPLEMENTATION\n#include "fastopt.h"\n'
            "const fo_tensor *volatile w; float *volatile x, *volatile y; int8_t *volatile n;\n"
            f"int main(void) {{ return {body}; }}\n"
        )
        program = folder / "size"
        subprocess.run([*compiler, *OPTIONS, source, "-o", program], check=True)
        size = compiler[0].replace("gcc", "size")
        shown = subprocess.run([size, program], check=True, capture_output=True, text=True).stdout
        sizes.append(int(re.findall(r"\d+", shown)[0]))
    return sizes[0] - sizes[1]


def main() -> None:
    print("Instructions a weight, groups of 32, of 64 in 2 bits\n")
    print("| | product | 8 bits | 6 | 5 | 4 | 3 | 2 | bytes of code |\n|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for target, (compiler, emulator) in TARGETS.items():
            size, counts = code_bytes(compiler, folder), instructions(compiler, emulator, folder)
            for kind, product in enumerate(("`fo_linear`", "`fo_linear_int8`")):
                few, many = counts[kind::4], counts[kind + 2 :: 4]
                each = " | ".join(f"{(m - f) / WEIGHTS:.2f}" for f, m in zip(few, many, strict=True))
                print(f"| {target} | {product} | {each} | {size:,} |", flush=True)
    print("\nOf others, counted in their sources:")
    for name, (count, weights) in OTHERS.items():
        print(f"{name}: {count / weights:.2f}")


if __name__ == "__main__":
    main()
