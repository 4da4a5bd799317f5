"""Frame stores: the frames of a data set as JPEG pictures, in a few large tar files with random access."""
