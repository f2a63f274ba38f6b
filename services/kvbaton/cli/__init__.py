"""The `kvbaton` command.

gRPC reads its settings from the environment, once, when it is first loaded: before any other import here. Its core's
remarks on forks and closed connections are of no use to an operator; errors still show. An operator's own settings win.
"""

import os

os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # noqa: TID251
