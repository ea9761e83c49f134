"""Networks: closed-form data, bundled and other pixel models, diffusers pipelines."""
