"""`python -m sensor_pipeline` is `sensor-pipeline`."""

from sensor_pipeline.cli import main

main()
