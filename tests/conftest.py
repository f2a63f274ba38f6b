"""What every test needs."""

import os

# Before torch and transformers are imported anywhere: one thread, since a test run shares two cores with other
# processes of its own; no look-ups on a model hub; no progress bars in the logs of failures.
os.environ.update({"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"})  # noqa: TID251
