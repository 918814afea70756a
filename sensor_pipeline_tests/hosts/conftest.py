"""Three hosts take minutes: only `make soak` tries them."""

from sensor_pipeline_tests.soak import IS_SOAK

collect_ignore = [] if IS_SOAK else ["test_hosts.py"]
