"""The benchmark: what the pipeline costs on its real path, as ratios to references measured in the same run.

`figures` says what is measured, `work` on which messages, `reference` against what, `naive` what must come out.
"""
