"""`pipelinerl parity`: start the processes of a run and measure whether its ratios can be trusted."""
