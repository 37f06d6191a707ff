"""From a folder of pictures to what a training step sees: scan, captions, buckets, order; torch only in cache and batches."""
