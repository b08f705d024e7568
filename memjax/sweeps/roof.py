"""Print the matrix-product roof of this machine, in operations a second.

A process of its own, so that the sweep itself holds no accelerator.
"""

from memjax.bench import make_roof

if __name__ == "__main__":
    print(make_roof("float32")())
