"""`python -m everest_ds` is `everest-ds`: what torchrun, deepspeed, mpirun and srun start."""

from everest_ds.cli import main

if __name__ == "__main__":
    main()
