-- The tables of the workload. Every type that Debezium carries, and some that it leaves out.
CREATE EXTENSION hstore;
CREATE EXTENSION citext;
CREATE EXTENSION ltree;
CREATE EXTENSION isn;

CREATE SCHEMA other;
CREATE TYPE mood AS ENUM ('sad', 'ok', 'very happy');
CREATE TYPE other."Mixed.Case" AS ENUM ('a', 'b''c');
CREATE TYPE pair AS (x int, y text);
CREATE DOMAIN whole AS int CHECK (VALUE >= 0);
CREATE DOMAIN small_whole AS whole;
CREATE DOMAIN price AS numeric(8, 2);
CREATE DOMAIN label AS varchar(20);
CREATE DOMAIN feeling AS mood;
CREATE DOMAIN stamp AS timestamp(3);
CREATE TYPE int_span AS RANGE (subtype = int);

CREATE TABLE numbers (
  id int PRIMARY KEY, si smallint, i int, bi bigint, r real, d double precision, o oid, b bool,
  n numeric, n10 numeric(10), n10_3 numeric(10, 3), n38_0 numeric(38, 0), n3_5 numeric(3, 5), n5_m2 numeric(5, -2), m money
);
CREATE TABLE texts (
  id int PRIMARY KEY, t text, v varchar, v10 varchar(10), c char, c10 char(10), qc "char", na name, ci citext, x xml,
  u uuid, j json, jb jsonb, lt ltree, h hstore, ba bytea, ts tsvector, e mood, em other."Mixed.Case", isb isbn
);
CREATE TABLE bits (id int PRIMARY KEY, b1 bit, b2 bit(2), b9 bit(9), b64 bit(64), vb varbit, vb1 varbit(1), vb20 varbit(20));
CREATE TABLE times (
  id int PRIMARY KEY, d date, t time, t0 time(0), t3 time(3), t4 time(4), tz timetz, tz2 timetz(2),
  ts timestamp, ts0 timestamp(0), ts3 timestamp(3), ts4 timestamp(4), tstz timestamptz, tstz0 timestamptz(0), tstz3 timestamptz(3), iv interval, ivs interval(3)
);
CREATE TABLE networks (id int PRIMARY KEY, i inet, c cidr, m macaddr, m8 macaddr8);
CREATE TABLE ranges (id int PRIMARY KEY, i4 int4range, i8 int8range, n numrange, d daterange, t tsrange, tz tstzrange);
CREATE TABLE shapes (id int PRIMARY KEY, p point, b box, s lseg, pa path, po polygon, c circle, l line);
CREATE TABLE arrays (
  id int PRIMARY KEY, si smallint[], i int[], bi bigint[], t text[], v varchar(10)[], c char(4)[], n numeric[], n2 numeric(8, 2)[], r real[],
  d double precision[], b bool[], dt date[], tm time[], tm3 time(3)[], tmz timetz[], ts timestamp[], ts3 timestamp(3)[], tstz timestamptz[], u uuid[], j json[], jb jsonb[],
  ba bytea[], o oid[], inet inet[], cidr cidr[], mac macaddr[], ir int4range[], tr tsrange[], tzr tstzrange[], e mood[], ci citext[], lt ltree[], h hstore[]
);
CREATE TABLE domains (id small_whole PRIMARY KEY, w whole, p price, l label, f feeling, s stamp);
CREATE TABLE unknown (
  id int PRIMARY KEY, pa pair, sp int_span, tq tsquery, lsn pg_lsn, x8 xid8, jp jsonpath, mr int4multirange, ia money[], xa xml[], iva interval[], ba bit(3)[], vba varbit[], na name[], pta point[], wa whole[], kept text
);
-- Without NULLs: what Debezium says of columns that a delete does not tell.
CREATE TABLE required (
  id int PRIMARY KEY, si smallint NOT NULL, i int NOT NULL, bi bigint NOT NULL, r real NOT NULL, d double precision NOT NULL, o oid NOT NULL, b bool NOT NULL,
  n numeric NOT NULL, n2 numeric(8, 2) NOT NULL, m money NOT NULL, t text NOT NULL, v varchar(10) NOT NULL, c char(4) NOT NULL, ci citext NOT NULL, x xml NOT NULL, u uuid NOT NULL, j json NOT NULL, jb jsonb NOT NULL,
  lt ltree NOT NULL, h hstore NOT NULL, ba bytea NOT NULL, tv tsvector NOT NULL, e mood NOT NULL, b1 bit NOT NULL, b9 bit(9) NOT NULL, vb varbit NOT NULL,
  dt date NOT NULL, tm time NOT NULL, tm3 time(3) NOT NULL, tmz timetz NOT NULL, ts timestamp NOT NULL, ts3 timestamp(3) NOT NULL, tstz timestamptz NOT NULL, iv interval NOT NULL,
  ip inet NOT NULL, ci4 cidr NOT NULL, mac macaddr NOT NULL, ir int4range NOT NULL, p point NOT NULL, bx box NOT NULL, ls lseg NOT NULL, pa path NOT NULL, po polygon NOT NULL, ci_ circle NOT NULL, li line NOT NULL,
  ia int[] NOT NULL, ta text[] NOT NULL, ea mood[] NOT NULL
);
CREATE TABLE defaults (
  id serial PRIMARY KEY, si smallint DEFAULT 7, i int NOT NULL DEFAULT 42, i_neg int DEFAULT -5, bi bigint DEFAULT 9223372036854775807, r real DEFAULT 1.5, d double precision NOT NULL DEFAULT '2.5', b bool DEFAULT true, bf bool NOT NULL DEFAULT false,
  n numeric DEFAULT 1.25, n2 numeric(8, 2) DEFAULT 3.1, m money DEFAULT '1.00', t text DEFAULT 'it''s', tn text DEFAULT NULL, te text NOT NULL DEFAULT '', tf text DEFAULT upper('abc'), tc text DEFAULT ('a' || 'b'), v varchar(10) DEFAULT 'v', vn varchar(10) DEFAULT NULL, c char(4) DEFAULT 'c', ci citext DEFAULT 'ci',
  u uuid DEFAULT '76019d1a-ad2e-4b22-96e9-1a6d6543c818', ug uuid DEFAULT gen_random_uuid(), j json DEFAULT '{"a": 1}', jb jsonb NOT NULL DEFAULT '{}', x xml DEFAULT '<a/>', h hstore DEFAULT 'a=>1', ba bytea DEFAULT '\x01', e mood DEFAULT 'ok', em other."Mixed.Case" DEFAULT 'a', b1 bit DEFAULT B'1', b4 bit(4) DEFAULT B'1010', vb varbit DEFAULT B'11',
  dt date DEFAULT '2020-02-03', dn date DEFAULT now(), dc date DEFAULT current_date, tm time DEFAULT '12:34:56.789', tm3 time(3) DEFAULT '01:02:03', tmz timetz DEFAULT '12:00+02', ts timestamp DEFAULT '2020-02-03 04:05:06.123456', ts3 timestamp(3) NOT NULL DEFAULT '2020-02-03 04:05:06.789', tsn timestamp DEFAULT now(), tstz timestamptz DEFAULT '2020-02-03 04:05:06.123456+02', tstzn timestamptz NOT NULL DEFAULT now(), tsct timestamp DEFAULT CURRENT_TIMESTAMP, iv interval DEFAULT '1 day',
  ip inet DEFAULT '10.0.0.1', ir int4range DEFAULT '[1,2)', ia int[] DEFAULT '{1,2}', p point DEFAULT '(1,2)', w whole DEFAULT 3, pr price DEFAULT 9.5, l label DEFAULT 'x', g int GENERATED ALWAYS AS IDENTITY, gs int GENERATED ALWAYS AS (1 + 1) STORED
);
-- The ends of what PostgreSQL holds, some of which Debezium does not.
CREATE TABLE extremes (
  id int PRIMARY KEY, d date, ts timestamp, ts3 timestamp(3), tstz timestamptz, tstz3 timestamptz(3), t time, tz timetz, t3 time(3), f8 float8[], da date[], tsa timestamp[], tza timestamptz[], tma time[],
  i2 int[], e2 mood[][], bo bool[], tv tsvector[], isa isbn[], bxa box[], lna line[], cca circle[], lsa lseg[], poa polygon[]
);
-- Identities and keys.
CREATE TABLE composite (b text, a int, c date, v int, PRIMARY KEY (a, b));
CREATE TABLE whole_row (id int PRIMARY KEY, v text, n int NOT NULL); ALTER TABLE whole_row REPLICA IDENTITY FULL;
CREATE TABLE whole_row_without_key (v text, n int); ALTER TABLE whole_row_without_key REPLICA IDENTITY FULL;
CREATE TABLE whole_row_unique (v text NOT NULL, n int NOT NULL UNIQUE, z int); ALTER TABLE whole_row_unique REPLICA IDENTITY FULL;
CREATE TABLE by_index (n int NOT NULL, v text NOT NULL UNIQUE, z int); ALTER TABLE by_index REPLICA IDENTITY USING INDEX by_index_v_key;
CREATE TABLE text_key (id text PRIMARY KEY, v int);
CREATE TABLE typed_key (at timestamptz, n numeric(8, 2), u uuid, v int, PRIMARY KEY (u, at, n));
CREATE TABLE log (v text, n int); ALTER TABLE log REPLICA IDENTITY NOTHING;
-- Large values that stay as they are.
CREATE TABLE toasted (
  id int PRIMARY KEY, n int, t text, v varchar, ba bytea, j json, jb jsonb, x xml, ta text[], ia int[], bia bigint[], ua uuid[], h hstore, nu numeric, tn text NOT NULL, ts tsvector, da date[], ja json[], va varchar[], f float8[], tsa timestamp[]
);
ALTER TABLE toasted ALTER t SET STORAGE EXTERNAL, ALTER v SET STORAGE EXTERNAL, ALTER ba SET STORAGE EXTERNAL, ALTER j SET STORAGE EXTERNAL, ALTER jb SET STORAGE EXTERNAL, ALTER x SET STORAGE EXTERNAL, ALTER ta SET STORAGE EXTERNAL, ALTER ia SET STORAGE EXTERNAL, ALTER bia SET STORAGE EXTERNAL, ALTER ua SET STORAGE EXTERNAL, ALTER h SET STORAGE EXTERNAL, ALTER nu SET STORAGE EXTERNAL, ALTER tn SET STORAGE EXTERNAL, ALTER ts SET STORAGE EXTERNAL, ALTER da SET STORAGE EXTERNAL, ALTER ja SET STORAGE EXTERNAL, ALTER va SET STORAGE EXTERNAL, ALTER f SET STORAGE EXTERNAL, ALTER tsa SET STORAGE EXTERNAL;
CREATE TABLE toasted_whole (id int PRIMARY KEY, n int, t text); ALTER TABLE toasted_whole REPLICA IDENTITY FULL; ALTER TABLE toasted_whole ALTER t SET STORAGE EXTERNAL;
CREATE TABLE toasted_key (id text PRIMARY KEY, n int); ALTER TABLE toasted_key ALTER id SET STORAGE EXTERNAL;
-- Names.
CREATE SCHEMA "Höhe & Tiefe";
CREATE TABLE "Höhe & Tiefe"."a ""quoted"" name" ("ID" int PRIMARY KEY, "café" text, "with space" text, "dots.and-dashes" int, "1st" int, "quote""d" int, "back\slash" int);
CREATE TABLE "UPPER-case" (id int PRIMARY KEY, v text);
-- Changes of shape.
CREATE TABLE changing (id int PRIMARY KEY, a int, b text NOT NULL);
CREATE TABLE finished (id int PRIMARY KEY);
