"""Data: shards of images and captions to batches of tensors.

Where to look:

    caption_files       files of captions: a TSV, JSON lines, JSON
    packing             image files and captions -> shards; tuple_packing for composition learning
    shards              reading shards; shard_streams opens them, shard_names and shard_sizes say which there are, how large
    shard_writer        writing shards
    shard_stats         statistics of shards, before a run, from the shard_records of their samples
    broken              samples that cannot be used: left out, counted, limited
    features            the frozen vision tower's features, stored in shards; feature_chunks: the images on their way
    datamodule          the Lightning data module: shards -> batches
    streams             the order of samples: by device and worker, shuffled, one caption per image and epoch
    loader              worker processes, epochs, and going on in the middle of one; workers starts and ends them
    batches             a stored sample -> a row -> a batch; tuples are those of composition learning
    sample_images       the image of a stored sample: its pixels, or its stored features
    tokenizer           text -> token ids; truncation of captions that keeps [RET]
    requests            captions read as requests for an image
    annotation_formats  published annotation files, recognised and read; annotations checks their entries
    image_source        the images of a folder or of shards, to index them
"""
