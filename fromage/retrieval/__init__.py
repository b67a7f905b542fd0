"""Retrieval: embeddings, image indexes and their search.

Where to look:

    base                what an index is, and its search; faiss_index and milvus_index are the two kinds
    ann                 approximate kinds: FAISS proposes candidates, rerank scores them exactly; chosen searches exactly
    queries             a prompt -> the row that it asks with; results are what is found, as images on a page
    embed_images        images -> rows, into an embedding_store; embed_ray does it on many machines
    build               embeddings -> a saved index; adding, removing, merging; sync follows a folder that changes
    index_folder        the files of a saved index; item_table has its images; open_index opens it
    image_root          where the images of an index are; missing counts those that are not there
    trust               whether what an index says of other files is believed
    metadata, where     columns to filter by, read from a user's table_file, and the language of filters
    authors_embeddings, clip_retrieval     rows that other programs embedded
    milvus_client, milvus_collection       the connection to Milvus, and what lies there
    metrics             exact ranks, and recalls and other metrics of them
"""
