"""The language model: builder, layer backends, Hugging Face conversion."""
