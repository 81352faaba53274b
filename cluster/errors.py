"""Expected failures of this package, as one tree; the command line prints them as one line without a traceback.

ClusterError
+-- ConfigError    a setting is unusable                       (cluster/config.py)
+-- CannotStart    something is wrong before anything started  (cluster/foreground.py)
+-- DoesNotFit     more GPUs or CPUs wanted than there are     (cluster/placement.py)
+-- StartFailed    a part of the deployment did not come up    (cluster/launch.py)
+-- ApiFailure     the router answered with an error           (cluster/http_client.py)
"""


class ClusterError(Exception):
    """Root of the expected failures of this package."""
