"""What InternVL2.5 is: configuration, conversation template, tokenizers, prompt expansion."""
