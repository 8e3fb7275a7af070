"""Model adapters: what pipedit knows about each family. The only package that imports diffusers and transformers."""
