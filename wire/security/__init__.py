"""TLS, certificates, tokens, enrolment messages."""
