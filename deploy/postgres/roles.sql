-- What the image of PostgreSQL runs once, as superuser, when its data directory is empty: the three roles of the
-- pipeline's database, and Dagster's database with a role of its own. What the roles may do in the tables,
-- `sensor-pipeline migrate` grants.

\getenv owner POSTGRES_OWNER
\getenv writer POSTGRES_WRITER
\getenv reader POSTGRES_READER
\getenv database PIPELINE_DB
\getenv dagster DAGSTER_POSTGRES_USER
\getenv dagster_database DAGSTER_POSTGRES_DB
\set owner_password `cat /run/secrets/owner_password`
\set writer_password `cat /run/secrets/writer_password`
\set reader_password `cat /run/secrets/reader_password`
\set dagster_password `cat /run/secrets/dagster_password`

CREATE ROLE :"owner" LOGIN PASSWORD :'owner_password';
CREATE ROLE :"writer" LOGIN PASSWORD :'writer_password';
CREATE ROLE :"reader" LOGIN PASSWORD :'reader_password';
CREATE DATABASE :"database" OWNER :"owner";
REVOKE ALL ON DATABASE :"database" FROM PUBLIC;

CREATE ROLE :"dagster" LOGIN PASSWORD :'dagster_password';
CREATE DATABASE :"dagster_database" OWNER :"dagster";
REVOKE ALL ON DATABASE :"dagster_database" FROM PUBLIC;
