"""Settings that must be made before PyTorch is imported; every program imports this package first."""
import os

# Threads that wait for each other sleep instead of spinning. On a machine that is busy with other processes,
# a spinning thread keeps the very core that the other one needs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
