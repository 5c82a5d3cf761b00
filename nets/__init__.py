"""Networks: input tensors -> class scores. Knows nothing of files, data sets or processes."""
