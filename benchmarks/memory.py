"""A training step of a DenseNet on a CPU: memory given back to the system after each step, and kept by the C library."""

import subprocess
import sys
import time
from statistics import median

STEPS, WARM_UP, TURNS = 10, 3, 3


def steps() -> float:
    """The median of some steps, in milliseconds."""
    import torch

    from normkit.lab.models.convolutional import densenet

    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = densenet(10, width=0.5).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    x, y = torch.randn(128, 3, 16, 16), torch.randint(10, (128,))
    taken = []
    for _ in range(WARM_UP + STEPS):
        started = time.perf_counter()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        taken.append(1e3 * (time.perf_counter() - started))
    return median(taken[WARM_UP:])


if __name__ == "__main__":
    if len(sys.argv) > 1:
        from normkit.lab.memory import keep_memory

        if sys.argv[1] == "kept" and not keep_memory():
            sys.exit("the C library is not glibc")
        print(steps())
    else:
        found: dict[str, list[float]] = {"given back": [], "kept": []}
        for _ in range(TURNS):
            for way, all_of_it in found.items():
                done = subprocess.run([sys.executable, __file__, way], capture_output=True, text=True, check=True)
                all_of_it.append(float(done.stdout))
        for way, all_of_it in found.items():
            print(f"{way:10}  {median(all_of_it):7.1f} ms a step  ({', '.join(f'{one:.1f}' for one in all_of_it)})")
        print(f"kept / given back: {median(found['kept']) / median(found['given back']):.2f}")
