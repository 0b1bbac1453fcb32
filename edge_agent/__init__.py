"""The device: drafts, decides, owns the session. Never imports cloud_worker."""
