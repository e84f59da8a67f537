"""From image files to batches: manifest, pack, phantom, datamodule."""
