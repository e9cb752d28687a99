"""Requests that outlive their callers: jobs, who carries them out, and where they are kept."""
