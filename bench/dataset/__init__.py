"""What a data-set job costs besides explaining, and what its batches do to maps."""
