"""What a sampled text is worth to a group, and the policy that such rewards lead to."""
