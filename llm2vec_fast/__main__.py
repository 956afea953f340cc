"""`python -m llm2vec_fast` is `llm2vec-fast`."""

from llm2vec_fast.cli import main

if __name__ == "__main__":
    main()
