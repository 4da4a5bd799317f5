"""Entry point of `python -m everest_ds`, the form of `everest-ds` that torchrun, mpirun and srun start."""

from everest_ds.cli import main

if __name__ == "__main__":
    main()
